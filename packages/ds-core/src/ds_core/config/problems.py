"""Problems of a configuration: found all at once, told with path, value, what is allowed and the nearest key."""

from __future__ import annotations

import types
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from ds_core.config.section import Section, show
from ds_core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pydantic_core import ErrorDetails

    from ds_core.config.reading import Document

__all__ = ["Path", "Problem", "dotted", "owners", "placed", "raise_problems", "sections_of", "unknown_key", "validate"]

S = TypeVar("S", bound=Section)
Path = tuple[Union[str, int], ...]  # noqa: UP007 - evaluated, and 3.10 cannot hash the new form in a tuple

MANY_KEYS = 12
"""A section with more keys than this is not listed in an error."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration."""

    path: str
    """Dotted path of the key."""
    text: str
    """What was received and what is allowed."""
    fix: str | None = None
    """What to do about it, where that is known."""
    keys: Path = ()
    """The same path as keys and indexes; empty where it is no key of the configuration."""
    ignorable: bool = False
    """Whether DeepSpeed ignores the key: compatibility mode drops it with a warning."""
    place: tuple[int, int] | None = None
    """Line and column in the file, where there is one."""

    @classmethod
    def at(cls, keys: Path, text: str, fix: str | None = None, *, ignorable: bool = False) -> Problem:
        """Return a problem of the key at ``keys``."""
        return cls(dotted(keys), text, fix, keys, ignorable)

    def __str__(self) -> str:
        at = "" if self.place is None else " (line {}, column {})".format(*self.place)
        return f"{self.path}{at}: {self.text}"


def placed(problem: Problem, document: Document, renamed: Mapping[Path, Path]) -> Problem:
    """Return ``problem`` with its line and column in ``document``: its key's, or those of the section that holds it.

    Args:
        problem: what was found.
        document: where it was found.
        renamed: where a deprecated key is read -> where it was written.
    """
    keys = problem.keys or tuple(problem.path.split("."))
    for length in range(len(keys), 0, -1):
        written = renamed.get(keys[:length], keys[:length])
        place = document.position(written)
        if place is not None:
            return replace(problem, place=place)
    return problem


def raise_problems(problems: Sequence[Problem], *, where: str) -> None:
    """Raise one ``ConfigError`` for all of ``problems``; do nothing without any."""
    if not problems:
        return
    if len(problems) == 1:
        only = problems[0]
        place = "" if only.place is None else ", line {}, column {}".format(*only.place)
        raise ConfigError(f"{only.path}: {only.text}", where=where + place, fix=only.fix)
    lines = [f"{len(problems)} problems in the configuration"]
    for problem in problems:
        lines.append(f"  {problem}")
        if problem.fix:
            lines.append(f"    fix: {problem.fix}")
    raise ConfigError("\n".join(lines), where=where)


def validate(model: type[S], data: Any, *, path: Path = ()) -> tuple[S | None, list[Problem]]:
    """Return ``data`` as a ``model`` and no problems, or None and everything that is wrong.

    Args:
        model: the section's class.
        data: what the user wrote there.
        path: where the section is in the configuration.
    """
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        return None, [_problem(model, details, path, data) for details in error.errors(include_url=False)]


def dotted(path: Path) -> str:
    """Return ``path`` as people write it; a key that has a dot itself is quoted.

    >>> dotted(("leaf_module", "names", 1)), dotted(("a.b", "c"))
    ('leaf_module.names[1]', '"a.b".c')
    """
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (f'"{part}"' if "." in part or not part else part)
    return text


def sections_of(model: type[Section]) -> dict[str, type[Section]]:
    """Return the fields of ``model`` that are sections, or hold several in a dict or a list -> their class."""
    found = {name: _section_class(info.annotation) for name, info in model.model_fields.items()}
    return {name: section for name, section in found.items() if section is not None}


def unknown_key(model: type[Section], path: Path, value: Any, *, others: Iterable[str] = ()) -> Problem:
    """Return the problem of a key that ``model`` does not have.

    Args:
        model: the class of the section that holds the key.
        path: where the key is.
        value: what was written there.
        others: further keys that would be valid there.
    """
    key = str(path[-1])
    keys = [*model.fields_by_key(), *others]
    homes = owners(key) if model.__module__.startswith("ds_core.config.") else []
    homes = [home for home in homes if home != dotted(path[:-1])]  # an argument of another optimizer is no home
    close = nearest(key, keys)
    if homes and not (len(path) == 1 and "" in homes):
        fix = "it belongs " + " or ".join(f'under "{home}"' if home else "at the top level" for home in homes)
    elif "." in key:
        fix = f"dots do not nest: write {_nested_key(key.split('.'), value)}"
    elif key.startswith("_"):
        fix = "write it as a comment (# ...), which HJSON allows, or remove it"
    elif close:
        fix = f'did you mean "{close}"?'
    elif keys and len(keys) <= MANY_KEYS:
        fix = f"allowed are {', '.join(sorted(keys))}"
    else:
        fix = "remove it"
    return Problem.at(path, f"unknown key (its value is {show(value)})", fix, ignorable=True)


def _nested_key(parts: Sequence[str], value: Any) -> str:
    inner = show(value)
    for part in reversed(parts[1:]):
        inner = f'{{"{part}": {inner}}}'
    return f'"{parts[0]}": {inner}'


IN_PARAMS = {
    **dict.fromkeys(("lr", "betas", "eps", "weight_decay", "momentum"), "optimizer.params"),
    **dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "scheduler.params"),
}


def owners(key: str) -> list[str]:
    """Return the sections that do have ``key``, "" for the top level; none where more than three would be named."""
    from ds_core.config.catalog import all_sections  # the tables of all sections are above this module
    from ds_core.config.config import Config

    found = [""] if key in Config.fields_by_key() else []
    for name, section in all_sections().items():
        found += [path for path, inner in _nested(section, name) if key in inner.fields_by_key()]
    found = found or [IN_PARAMS[key]] if key in IN_PARAMS else found
    return found if len(found) <= 3 else []


def _nested(model: type[Section], path: str) -> list[tuple[str, type[Section]]]:
    """Return ``model`` and the sections inside it, each with its dotted path."""
    found = [(path, model)]
    for name, section in sections_of(model).items():
        each = ".*" if _in_collection(model.model_fields[name].annotation) else ""
        found += _nested(section, f"{path}.{name}{each}")
    return found


COLLECTIONS = (dict, list, tuple)
"""What a field may hold several sections in; their path has one more part, a name of the user's or an index."""


def _in_collection(annotation: Any) -> bool:
    origin = get_origin(annotation)
    return origin in COLLECTIONS or (origin is not None and any(map(_in_collection, get_args(annotation))))


def _section_class(annotation: Any) -> type[Section] | None:
    if get_origin(annotation) in (Annotated, Union, types.UnionType, *COLLECTIONS):
        return next(filter(None, map(_section_class, get_args(annotation))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _problem(model: type[Section], details: ErrorDetails, path: Path, data: Any) -> Problem:
    location = details["loc"]
    holder, key = _holder(model, location)
    full = (*path, *location)
    kind, context = details["type"], details.get("ctx", {})
    # pydantic reports what its validators made of the value; people look for what they wrote.
    value = _at(data, location, details["input"])
    if kind == "invalid_key":
        return Problem.at((*full[:-1], str(full[-1])), "a key must be text", 'put it in quotes: "..."')
    if holder is not None and key is not None and key not in holder.fields_by_key():
        return unknown_key(holder, full, value)
    if kind == "extra_forbidden" and holder is not None and key is not None:
        beside = _at(data, location[:-1], {})
        others = [
            name
            for name, field in holder.fields_by_key().items()
            if field == holder.fields_by_key()[key] and name in beside
        ]
        same = " and ".join(f'"{name}"' for name in others if name != key)
        return Problem.at(full, f"{same}, given too, means the same", "keep one of the two")
    if kind == "missing":
        return Problem.at(full, "is missing", f'add "{location[-1]}"' if location else None)
    expected = _expected(kind, context, holder, key) or details["msg"][:1].lower() + details["msg"][1:]
    fix = None
    if kind == "literal_error" and isinstance(value, str):
        close = nearest(value, context["expected"].replace("'", "").replace(" or ", ", ").split(", "))
        fix = f'did you mean "{close}"?' if close else None
    elif kind == "not_built":
        fix = "remove it"
    return Problem(dotted(full) or "the configuration", f"got {show(value)}, {expected}", fix, full)


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
        if _in_collection(holder.model_fields[field].annotation) and next(parts, None) is None:
            return None, None  # the last part names an entry, which is no key of ours
        holder = section
    last = location[-1] if location else None
    return (holder, last) if isinstance(last, str) else (None, None)


PLAIN = {
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


def _expected(kind: str, context: dict[str, Any], holder: type[Section] | None, key: str | None) -> str | None:
    if kind == "literal_error":
        return f"allowed are {context['expected']}".replace("'", '"')
    if kind in ("greater_than_equal", "less_than_equal") and holder is not None and key is not None:
        bounds: dict[str, Any] = {}
        for rule in holder.model_fields[holder.fields_by_key()[key]].metadata:
            bounds |= {name: getattr(rule, name) for name in ("ge", "le") if hasattr(rule, name)}
        if len(bounds) == 2:
            return f"allowed are {bounds['ge']} to {bounds['le']}"
    text = PLAIN.get(kind)
    return text.format(**context) if text else None
