"""What to say of a key that nobody reads: how it should be called, where it belongs, or who might have written it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from ds_core.config.paths import Path, dotted, nested, sections_of
from ds_core.config.section import Section, show
from ds_core.errors import nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["COMPATIBLE_VARIABLE", "advice", "owners"]

COMPATIBLE_VARIABLE = "DS_CONFIG_COMPATIBLE"
"""Environment variable that turns compatibility mode on where the caller does not choose: 1, or 0."""
DROP_OTHERS = f"set {COMPATIBLE_VARIABLE}=1, which drops keys of other tools with a warning"
OF_CLIENTS = ("msamp", "comms_config", "monitor_config")
"""Top-level keys that clients write for themselves: Accelerate's MS-AMP, and what LLaMA-Factory copies around."""
ALSO_CALLED = {
    "learning_rate": "lr",
    "epsilon": "eps",
    "name": "type",
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_batch_size", "per_gpu_train_batch_size"),
        "train_micro_batch_size_per_gpu",
    ),
    **dict.fromkeys(("max_grad_norm", "clip_grad", "grad_clip", "gradient_clip_val"), "gradient_clipping"),
}
"""What other libraries call a key."""
OF_EITHER = {"batch_size": ("train_micro_batch_size_per_gpu", "train_batch_size")}
"""Words that may mean one key or another; taking one for the other would train something else."""
WRAPPERS = ("config", "deepspeed", "deepspeed_config", "ds_config")
"""Keys under which a whole configuration stands in other files."""
IN_PARAMS = {
    **dict.fromkeys(("lr", "betas", "eps", "weight_decay", "momentum"), "optimizer.params"),
    **dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "scheduler.params"),
}
MANY_KEYS = 12
"""A section with more keys than this is not listed."""
MANY_HOMES = 3
"""A key that more sections have belongs to none in particular."""


def advice(
    model: type[Section], path: Path, value: Any, *, others: Iterable[str] = (), ignorable: bool = True
) -> tuple[str, Path | None]:
    """Return what to do about the key at ``path``, which ``model`` does not have, and what it was probably meant to be.

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
    if (
        len(path) == 1
        and key in WRAPPERS
        and isinstance(value, dict)
        and not model.fields_by_key().keys().isdisjoint(value)
    ):
        return "write its keys at the top level", None
    if len(parts) > 1 and parts[0] in (*sections_of(model), *others):
        nested_key = f"dots do not nest: write {_nested_key(parts, value)}"
        return f"{nested_key}, or {DROP_OTHERS}" if ignorable else nested_key, None
    if not key.startswith("_") and not (len(path) == 1 and key in OF_CLIENTS):
        fix, meant = _meant(model, path, keys)
        if fix:
            return fix, meant
        few = [info.serialization_alias or name for name, info in model.model_fields.items()]
        if len(path) > 1 and 0 < len(few) <= MANY_KEYS:
            return f"use one of {', '.join(sorted(few))}" + (f"; or {DROP_OTHERS}" if ignorable else ""), None
    return f"remove it, or {DROP_OTHERS}" if ignorable else "remove it", None


def _meant(model: type[Section], path: Path, keys: Sequence[str]) -> tuple[str, Path | None]:
    """Return what the key should have been called, or where it belongs; empty where nothing is like it."""
    key = str(path[-1])
    if key in OF_EITHER and set(OF_EITHER[key]) <= {*keys}:
        return "did you mean " + " or ".join(f'"{word}"' for word in OF_EITHER[key]) + "?", None
    close = ALSO_CALLED[key] if key in ALSO_CALLED and ALSO_CALLED[key] in keys else nearest(key, keys)
    homes = owners(key) if model.__module__.startswith("ds_core.config.") else ()
    # An argument of another optimizer has no home elsewhere.
    homes = tuple(home for home in homes if home != dotted(path[:-1]))
    # A key of this very section is nearer than one of another, unless that one has exactly this name at the top.
    if close and len(path) > 1 and "" not in homes:
        homes = ()
    if homes:
        words = " or ".join(f'under "{home}"' if home else "at the top level" for home in homes)
        is_one = len(homes) == 1 and "*" not in homes[0]
        return f"it belongs {words}", (*filter(None, homes[0].split(".")), key) if is_one else None
    return (f'did you mean "{close}"?', (*path[:-1], close)) if close else ("", None)


def _nested_key(parts: Sequence[str], value: Any) -> str:
    inner = show(value)
    for part in reversed(parts[1:]):
        inner = f'{{"{part}": {inner}}}'
    return f'"{parts[0]}": {inner}'


@cache
def _homes() -> Mapping[str, tuple[str, ...]]:
    """Return every key -> the sections that have it, "" for the top level."""
    from ds_core.config.catalog import RARE, all_sections  # the tables of all sections are above this module
    from ds_core.config.config import Config

    found: dict[str, list[str]] = {key: [""] for key in Config.fields_by_key()}
    for name, section in all_sections().items():
        for path, inner in nested(section, name):
            for key in inner.fields_by_key():
                # What init_inference takes has a key for everything, and a short word stands for something else in each
                # of the rarer sections.
                if name != "inference" and not (name in RARE and "_" not in key and len(key) < 8):
                    found.setdefault(key, []).append(path)
    for key, home in IN_PARAMS.items():
        found.setdefault(key, [home])
    return {key: tuple(homes) for key, homes in found.items()}


def owners(key: str) -> tuple[str, ...]:
    """Return the sections that do have ``key``, "" for the top level; none where that is no help."""
    found = _homes().get(key, ())
    return found if len(found) <= MANY_HOMES else ()
