"""Problems of a configuration: found all at once, told with path, value, what is allowed and the nearest key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import ValidationError

from ds_core.config.paths import Path, dotted, in_collection, sections_of
from ds_core.config.section import AUTO, Section, show
from ds_core.config.unknown import advice
from ds_core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pydantic_core import ErrorDetails

    from ds_core.config.reading import Document

__all__ = [
    "Problem",
    "as_written",
    "in_order",
    "placed",
    "raise_problems",
    "unknown_key",
    "validate",
]

S = TypeVar("S", bound=Section)
MANY = 100
"""More problems than this are counted, not listed, and get no advice: finding the nearest key takes its time."""
NO_PLACE = (math.inf,)


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration."""

    keys: Path
    """The way to the key, in today's words; empty for the configuration as a whole."""
    text: str
    """What was received and what is allowed."""
    fix: str | None = None
    """What to do about it, where that is known."""
    _: KW_ONLY
    kind: Literal["value", "unknown", "missing"] = "value"
    """``unknown``: nobody reads the key; ``missing``: it is not there."""
    ignorable: bool = False
    """Whether DeepSpeed ignores the key: compatibility mode drops it with a warning."""
    meant: Path | None = None
    """What an unknown key was probably meant to be."""
    written: Path | None = None
    """Where it was written, if not at ``keys``."""
    place: tuple[int, int] | None = None
    """Line and column in the file, where there is one."""

    @property
    def path(self) -> str:
        """The way to the key as people write it, in the words of the configuration."""
        return dotted(self.keys if self.written is None else self.written) or "the configuration"

    def __str__(self) -> str:
        at = "" if self.place is None else " (line {}, column {})".format(*self.place)
        return f"{self.path}{at}: {self.text}"


def placed(problem: Problem, document: Document, renamed: Mapping[Path, Path]) -> Problem:
    """Return ``problem`` with its line and column in ``document``: its key's, or those of the section that holds it.

    Args:
        problem: what was found.
        document: where it was found.
        renamed: where a key is read -> where it was written: deprecated and misspelt ones.
    """
    written = as_written(problem.keys, renamed)
    if written != problem.keys:
        problem = replace(problem, written=written)
        if problem.keys in renamed:
            problem = replace(problem, text=f"{problem.text} (it is read as {dotted(problem.keys)})")
    places = (document.position(written[:length]) for length in range(len(written), 0, -1))
    return replace(problem, place=next((place for place in places if place is not None), None))


def as_written(keys: Path, renamed: Mapping[Path, Path]) -> Path:
    """Return where the key that is read at ``keys`` was written, itself or a section that holds it being renamed.

    >>> as_written(("bf16", "enabled"), {("bf16",): ("bfloat16",)})
    ('bfloat16', 'enabled')
    """
    for length in range(len(keys), 0, -1):
        old = renamed.get(keys[:length])
        if old is not None:
            return (*old, *keys[length:])
    return keys


def in_order(problems: Iterable[Problem], document: Document) -> list[Problem]:
    """Return ``problems`` in the order of their keys in ``document``; those of keys that are not there come last."""
    places: dict[int, dict[Any, int]] = {}

    def order(problem: Problem) -> tuple[float, ...]:
        if document.text is not None:
            return problem.place or NO_PLACE
        # The same for a mapping, which has no lines: the key's place among its siblings, level by level.
        found: list[float] = []
        holder: Any = document.raw
        for part in problem.written or problem.keys:
            if isinstance(holder, Mapping):
                if id(holder) not in places:
                    places[id(holder)] = {key: index for index, key in enumerate(holder)}
                siblings = places[id(holder)]
                if part not in siblings:
                    break
                found.append(siblings[part])
            elif isinstance(holder, (list, tuple)) and isinstance(part, int) and part < len(holder):
                found.append(part)
            else:
                break
            holder = holder[part]
        return tuple(found) or NO_PLACE

    return sorted(problems, key=order)


def raise_problems(problems: Sequence[Problem], *, where: str) -> None:
    """Raise one ``ConfigError`` for all of ``problems``; do nothing without any."""
    if not problems:
        return
    if len(problems) == 1:
        only = problems[0]
        place = "" if only.place is None else ", line {}, column {}".format(*only.place)
        raise ConfigError(f"{only.path}: {only.text}", where=where + place, fix=only.fix)
    lines = [f"{len(problems)} problems in the configuration"]
    for problem in problems[:MANY]:
        lines.append(f"  {problem}")
        if problem.fix:
            lines.append(f"    fix: {problem.fix}")
    if len(problems) > MANY:
        lines.append(f"  and {len(problems) - MANY} more")
    raise ConfigError("\n".join(lines), where=where)


def validate(
    model: type[S], data: Any, *, path: Path = (), unknown_is_ignorable: bool = True
) -> tuple[S | None, list[Problem]]:
    """Return ``data`` as a ``model`` and no problems, or None and everything that is wrong.

    Args:
        model: the section's class.
        data: what the user wrote there.
        path: where the section is in the configuration.
        unknown_is_ignorable: whether DeepSpeed ignores keys that it does not know there.
    """
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    return None, [
        _problem(model, each, path, data, unknown_is_ignorable, advise=index < MANY)
        for index, each in enumerate(details)
    ]


def unknown_key(
    model: type[Section],
    path: Path,
    value: Any,
    *,
    others: Iterable[str] = (),
    ignorable: bool = True,
    advise: bool = True,
) -> Problem:
    """Return the problem of a key that ``model`` does not have; the arguments are those of ``unknown.advice``.

    ``advise``: whether to look for what was meant.
    """
    fix, meant = advice(model, path, value, others=others, ignorable=ignorable) if advise else ("remove it", None)
    text = f"unknown key (its value is {model.shown(path[-1], value)})"
    return Problem(path, text, fix, kind="unknown", ignorable=ignorable, meant=meant)


def _problem(
    model: type[Section], details: ErrorDetails, path: Path, data: Any, unknown_is_ignorable: bool, *, advise: bool
) -> Problem:
    location = details["loc"]
    holder, key = _holder(model, location)
    full = (*path, *location)
    kind, context = details["type"], details.get("ctx", {})
    # pydantic reports what its validators made of the value; people look for what they wrote.
    value = _at(data, location, details["input"])
    if kind == "invalid_key":
        return Problem(tuple(map(str, full)), f"a key must be text, got {show(full[-1])}", f'write it as "{full[-1]}"')
    if holder is not None and key is not None and key not in holder.fields_by_key():
        return unknown_key(holder, full, value, ignorable=unknown_is_ignorable, advise=advise)
    if kind == "extra_forbidden" and holder is not None and key is not None:
        beside = _at(data, location[:-1], {})
        others = [
            name
            for name, field in holder.fields_by_key().items()
            if field == holder.fields_by_key()[key] and name in beside
        ]
        same = " and ".join(f'"{name}"' for name in others if name != key)
        return Problem(full, f"{same}, given too, means the same", "keep one of the two")
    if kind == "missing":
        text = details["msg"] if details["msg"].startswith("is missing") else "is missing"
        return Problem(full, text, f'add "{location[-1]}"' if location else None, kind="missing")
    expected = _expected(kind, context, holder, key) or _sentence(details["msg"])
    if kind == "needs":  # something else, so what is there is of no interest
        return Problem(full, expected)
    fix = None
    if value is None and holder is not None and key is not None:
        fix = "remove it: without it the default holds"
    elif isinstance(value, str) and value.strip().lower() == AUTO:
        fix = f'did you mean "{AUTO}"?'
    elif kind == "model_type":
        fix = _in_full(sections_of(holder).get(holder.fields_by_key()[key]) if holder and key else model, value)
    elif kind == "contradiction":
        fix = "remove the old key"
    elif kind == "literal_error" and isinstance(value, str):
        close = nearest(value, context["expected"].replace("'", "").replace(" or ", ", ").split(", "))
        fix = f'did you mean "{close}"?' if close else None
    elif kind == "not_built":
        fix = context["fix"]
    shown = holder.shown(key, value) if holder is not None and key is not None else show(value)
    return Problem(full, f"got {shown}, {expected}", fix)


def _in_full(section: type[Section] | None, value: Any) -> str | None:
    """Return the section that somebody meant who wrote ``value`` in its place, where that is clear."""
    for key, kind in (("enabled", bool), ("type", str), ("device", str), ("stage", int)):
        if section is not None and key in section.fields_by_key() and type(value) is kind:
            return None if validate(section, {key: value})[1] else f"write {show({key: value})}"
    return None


def _at(data: Any, location: Path, default: Any) -> Any:
    for part in location:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):  # a place that only exists after a legacy form was rewritten
            return default
    return data


def _holder(model: type[Section], location: tuple[str | int, ...]) -> tuple[type[Section] | None, str | None]:
    """Return the class of the section that holds the last key of ``location``, and that key.

    Both are None where the location leads into a list or a free dict.
    """
    holder = model
    parts = iter(location[:-1])
    for part in parts:
        field = holder.fields_by_key().get(str(part), "")
        section = sections_of(holder).get(field)
        if section is None:
            return None, None
        if in_collection(holder.model_fields[field].annotation) and next(parts, None) is None:
            return None, None  # the last part names an entry, which is no key of ours
        holder = section
    last = location[-1] if location else None
    return (holder, last) if isinstance(last, str) else (None, None)


PLAIN = {
    "int_parsing_size": "is too large",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "dict_type": "must be an object {{ ... }}",
    "model_type": "must be an object {{ ... }}",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
}


def _sentence(message: str) -> str:
    """Return pydantic's ``message`` as the middle of a sentence, a ValueError's own as it is."""
    own = message.removeprefix("Value error, ")
    return own if own != message else message[:1].lower() + message[1:]


def _expected(kind: str, context: dict[str, Any], holder: type[Section] | None, key: str | None) -> str | None:
    if kind == "literal_error":
        words = context["expected"].replace("'", '"')
        return f"allowed are {words}" if " or " in words else f"only {words} is allowed"
    if kind in ("greater_than_equal", "less_than_equal") and holder is not None and key is not None:
        bounds: dict[str, Any] = {}
        for rule in holder.model_fields[holder.fields_by_key()[key]].metadata:
            bounds |= {name: getattr(rule, name) for name in ("ge", "le") if hasattr(rule, name)}
        if len(bounds) == 2:
            return f"allowed are {bounds['ge']} to {bounds['le']}"
    text = PLAIN.get(kind)
    shown = {name: f"{bound:g}" if isinstance(bound, float) else bound for name, bound in context.items()}
    return text.format(**shown) if text else None
