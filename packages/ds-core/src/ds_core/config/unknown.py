"""What to say of a key that nobody reads: how it should be called, where it belongs, or who might have written it."""

from __future__ import annotations

import json
import types
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from ds_core.config.section import Section, show
from ds_core.errors import nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["COMPATIBLE_VARIABLE", "Path", "advice", "dotted", "in_collection", "owners", "sections_of"]

Path = tuple[Union[str, int], ...]  # noqa: UP007 - evaluated, and 3.10 cannot hash the new form in a tuple

COMPATIBLE_VARIABLE = "DS_CONFIG_COMPATIBLE"
"""Environment variable that turns compatibility mode on where the caller does not choose: 1, or 0."""
DROP_OTHERS = f"set {COMPATIBLE_VARIABLE}=1, which drops keys of other tools with a warning"
OF_CLIENTS = ("msamp", "comms_config", "monitor_config")
"""Top-level keys that clients write for themselves: Accelerate's MS-AMP, and what LLaMA-Factory copies around."""
ALSO_CALLED = {"learning_rate": "lr", "epsilon": "eps", "name": "type"}
"""What other libraries call a key."""
IN_PARAMS = {
    **dict.fromkeys(("lr", "betas", "eps", "weight_decay", "momentum"), "optimizer.params"),
    **dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "scheduler.params"),
}
MANY_KEYS = 12
"""A section with more keys than this is not listed."""
MANY_HOMES = 3
"""A key that more sections have belongs to none in particular."""


def advice(model: type[Section], path: Path, value: Any, *, others: Iterable[str] = (), ignorable: bool = True) -> str:
    """Return what to do about the key at ``path``, which ``model`` does not have.

    Args:
        model: the class of the section that holds the key.
        path: where the key is.
        value: what was written there.
        others: further keys that would be valid there.
        ignorable: whether compatibility mode would drop it.
    """
    key = str(path[-1])
    keys = [*model.fields_by_key(), *others]
    parts = key.split(".")
    if len(parts) > 1 and parts[0] in keys:
        nested = f"dots do not nest: write {_nested_key(parts, value)}"
        return f"{nested}, or {DROP_OTHERS}" if ignorable else nested
    if not key.startswith("_") and not (len(path) == 1 and key in OF_CLIENTS):
        meant = _meant(model, path, keys)
        if meant:
            return meant
        few = [info.serialization_alias or name for name, info in model.model_fields.items()]
        if len(path) > 1 and 0 < len(few) <= MANY_KEYS:
            return f"use one of {', '.join(sorted(few))}" + (f"; or {DROP_OTHERS}" if ignorable else "")
    return f"remove it, or {DROP_OTHERS}" if ignorable else "remove it"


def _meant(model: type[Section], path: Path, keys: Sequence[str]) -> str:
    """Return what the key should have been called, or where it belongs; empty where nothing is like it."""
    key = str(path[-1])
    close = ALSO_CALLED[key] if key in ALSO_CALLED and ALSO_CALLED[key] in keys else nearest(key, keys)
    homes = owners(key) if model.__module__.startswith("ds_core.config.") else []
    # An argument of another optimizer has no home elsewhere.
    homes = [home for home in homes if home != dotted(path[:-1])]
    # A key of this very section is nearer than one of another, unless that one has exactly this name at the top.
    if close and len(path) > 1 and "" not in homes:
        homes = []
    if homes:
        return "it belongs " + " or ".join(f'under "{home}"' if home else "at the top level" for home in homes)
    return f'did you mean "{close}"?' if close else ""


def _nested_key(parts: Sequence[str], value: Any) -> str:
    inner = show(value)
    for part in reversed(parts[1:]):
        inner = f'{{"{part}": {inner}}}'
    return f'"{parts[0]}": {inner}'


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
            text += ("." if text else "") + (part if is_plain else json.dumps(part, ensure_ascii=False))
    return text


def sections_of(model: type[Section]) -> dict[str, type[Section]]:
    """Return the fields of ``model`` that are sections, or hold several in a dict or a list -> their class."""
    found = {name: _section_class(info.annotation) for name, info in model.model_fields.items()}
    return {name: section for name, section in found.items() if section is not None}


def owners(key: str) -> list[str]:
    """Return the sections that do have ``key``, "" for the top level; none where that is no help."""
    from ds_core.config.catalog import RARE, all_sections  # the tables of all sections are above this module
    from ds_core.config.config import Config

    found = [""] if key in Config.fields_by_key() else []
    for name, section in all_sections().items():
        # What init_inference takes has a key for everything, and a short word stands for something else in each of the
        # rarer sections.
        if name == "inference" or (name in RARE and "_" not in key and len(key) < 8):
            continue
        found += [path for path, inner in _nested(section, name) if key in inner.fields_by_key()]
    found = found or [IN_PARAMS[key]] if key in IN_PARAMS else found
    return found if len(found) <= MANY_HOMES else []


def _nested(model: type[Section], path: str) -> list[tuple[str, type[Section]]]:
    """Return ``model`` and the sections inside it, each with its dotted path."""
    found = [(path, model)]
    for name, section in sections_of(model).items():
        each = ".*" if in_collection(model.model_fields[name].annotation) else ""
        found += _nested(section, f"{path}.{name}{each}")
    return found


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
