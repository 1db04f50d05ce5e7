"""Keys as paths: how people write them, and which sections lie along them."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from ds_core.config.section import AUTO, Section
from ds_core.config.showing import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo

__all__ = ["Path", "dotted", "fields_along", "in_collection", "is_open", "nested", "open_paths", "sections_of"]

Path = tuple[Union[str, int], ...]  # noqa: UP007 - evaluated, and 3.10 cannot hash the new form in a tuple
"""The way to a value: keys of objects and indexes of lists."""


def dotted(path: Path) -> str:
    """Return ``path`` as people write it; a key that has a dot or a space itself is quoted.

    >>> dotted(("leaf_module", "names", 1)), dotted(("a.b", "c"))
    ('leaf_module.names[1]', '"a.b".c')
    """
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            is_plain = part and part.isprintable() and not any(letter in '."[] ' for letter in part)
            text += ("." if text else "") + (part if is_plain else printable(json.dumps(part, ensure_ascii=False)))
    return text


def open_paths(value: Any) -> Iterator[Path]:
    """Yield the way to each ``"auto"`` left inside ``value``, the empty one where it is ``"auto"`` itself.

    >>> list(open_paths({"lr": 0.1, "betas": [0.9, "auto"]})), list(open_paths("auto"))
    ([('betas', 1)], [()])
    """
    if isinstance(value, str):
        if value == AUTO:
            yield ()
    elif isinstance(value, (Mapping, list, tuple)):
        for part, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            # A caller's dict may have keys of any type, which is a problem that is told elsewhere.
            key = str(part) if isinstance(value, Mapping) else part
            yield from ((key, *path) for path in open_paths(item))


def is_open(value: Any) -> bool:
    """Return whether ``"auto"`` is left in ``value``, at any depth.

    >>> is_open(0.1), is_open({"betas": [0.9, "auto"]})
    (False, True)
    """
    return next(open_paths(value), None) is not None


@cache
def sections_of(model: type[Section]) -> Mapping[str, type[Section]]:
    """Return the fields of ``model`` that are sections, or hold several in a dict or a list -> their class."""
    found = {name: _section_class(info.annotation) for name, info in model.model_fields.items()}
    return {name: section for name, section in found.items() if section is not None}


def nested(model: type[Section], path: str) -> list[tuple[str, type[Section]]]:
    """Return ``model`` and the sections inside it, each with its dotted path."""
    found = [(path, model)]
    for name, section in sections_of(model).items():
        each = ".*" if in_collection(model.model_fields[name].annotation) else ""
        found += nested(section, f"{path}.{name}{each}")
    return found


def fields_along(model: type[Section], path: Path) -> Iterator[FieldInfo]:
    """Yield the fields that lie along ``path``, which begins in ``model``; it may end inside a value, or at no field.

    >>> from ds_core.config.sections.zero import ZeroSection
    >>> [info.annotation.__name__ for info in fields_along(ZeroSection, ("leaf_module", "names", 0))]
    ['LeafModuleSection', 'tuple']
    """
    parts = iter(path)
    section: type[Section] | None = model
    for part in parts:
        field = section.fields_by_key().get(str(part)) if section is not None else None
        if section is None or field is None:
            return
        yield section.model_fields[field]
        if in_collection(section.model_fields[field].annotation):
            next(parts, None)  # the name or the index of one of several sections
        section = sections_of(section).get(field)


COLLECTIONS = (dict, list, tuple)
"""What a field may hold several sections in; their path has one more part, a name of the user's or an index."""


def in_collection(annotation: Any) -> bool:
    """Return whether a field of this type holds its sections by name or by index."""
    origin = get_origin(annotation)
    return origin in COLLECTIONS or (origin is not None and any(map(in_collection, get_args(annotation))))


def _section_class(annotation: Any) -> type[Section] | None:
    if get_origin(annotation) in (Annotated, Union, types.UnionType, *COLLECTIONS):
        return next(filter(None, map(_section_class, get_args(annotation))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
