"""Deprecated keys: the one table of what is read as something else today.

Loading reads a configuration through :func:`migrate`, with a warning per old key; ``ds config migrate`` writes the
result down.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ds_core.config.paths import Path, dotted
from ds_core.config.problems import Problem
from ds_core.config.section import AUTO, show

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["DEPRECATED", "Deprecated", "Renamed", "migrate"]


@dataclass(frozen=True)
class Renamed:
    """One deprecated key that was read as another."""

    old: Path
    """Where it was written."""
    new: Path | None
    """Where it is read; None: it was dropped."""
    instead: str | None
    """The replacement as users write it; None: nothing takes its place."""

    @property
    def text(self) -> str:
        """What to do about it."""
        return "remove it" if self.instead is None else f"write {self.instead}"

    def __str__(self) -> str:
        return f"{dotted(self.old)} is deprecated: {self.text}"


@dataclass(frozen=True)
class Deprecated:
    """One old key."""

    section: tuple[str, ...]
    """The section that holds it: one name, or none at the top level."""
    old: str
    """The key."""
    new: str | None
    """The key of the same section that is read instead; None: nothing is."""
    instead: str
    """The replacement as users write it."""
    is_switch: bool = False
    """Only true and false are understood, and false asks for nothing."""
    value: Callable[[Any], Any] = lambda value: value
    """From the old key's value to the new one's."""
    yields: bool = False
    """Where both are given, DeepSpeed ignores the old key."""


def _on_cpu(_: Any) -> Any:
    return {"device": "cpu"}


_ZERO = ("zero_optimization",)
DEPRECATED: tuple[Deprecated, ...] = (
    Deprecated((), "bfloat16", "bf16", '"bf16"', yields=True),
    Deprecated(("bf16",), "check_overflow", "check_grad_overflow", '"check_grad_overflow"'),
    Deprecated(_ZERO, "cpu_offload", "offload_optimizer", '"offload_optimizer": {"device": "cpu"}', True, _on_cpu),
    Deprecated(_ZERO, "cpu_offload_param", "offload_param", '"offload_param": {"device": "cpu"}', True, _on_cpu),
    Deprecated(_ZERO, "cpu_offload_use_pin_memory", None, '"pin_memory" in an offload section', True),
    Deprecated(
        _ZERO,
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_gather_16bit_weights_on_model_save",
        '"stage3_gather_16bit_weights_on_model_save"',
    ),
    Deprecated(("inference",), "replace_method", None, "nothing in its place"),
)
"""In the order in which they are applied."""


def migrate(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[Renamed], list[Problem]]:
    """Return ``raw`` in today's words, what was renamed, and the old keys that cannot be.

    ``raw`` is left as it is. A key that cannot be read stays out of the result, so it is told once.

    >>> migrate({"zero_optimization": {"stage": 2, "cpu_offload": True}})[0]
    {'zero_optimization': {'stage': 2, 'offload_optimizer': {'device': 'cpu'}}}
    """
    result = dict(raw)
    renamed: list[Renamed] = _legacy_zero(result)
    problems: list[Problem] = []
    for row in DEPRECATED:
        holder: Any = result
        for part in row.section:
            holder = holder.get(part)
            if not isinstance(holder, dict):
                break
        if not isinstance(holder, dict) or row.old not in holder:
            continue
        if row.section:
            # A copy, made where it is changed; sections with old keys are one level deep.
            (name,) = row.section
            holder = result[name] = dict(holder)
        done, problem = _apply(row, holder)
        # In a section that was renamed itself, the key was written under the section's old name.
        renamed += [replace(one, old=_as_written(one.old, renamed)) for one in done]
        problems += problem
    renamed += _moved(result)
    return result, renamed, problems


def _as_written(keys: Path, renamed: list[Renamed]) -> Path:
    earlier = {row.new: row.old for row in renamed if row.new is not None}
    return earlier.get(keys[:1], keys[:1]) + keys[1:]


def _moved(result: dict[str, Any]) -> list[Renamed]:
    """Move deprecated keys of ``inference`` into its sub-sections; the section refuses what contradicts them."""
    if not isinstance(result.get("inference"), dict):
        return []
    from ds_core.config.sections.inference import InferenceSection
    from ds_core.config.sections.moved import moved

    result["inference"], moves = moved(InferenceSection, result["inference"])
    return [
        Renamed(("inference", old), ("inference", *new), f'"{new[0]}": {{"{new[1]}": ...}}')
        for old, new in moves.items()
    ]


def _apply(row: Deprecated, holder: dict[str, Any]) -> tuple[list[Renamed], list[Problem]]:
    value = holder.pop(row.old)
    old = (*row.section, row.old)
    if row.is_switch and not isinstance(value, bool) and value != AUTO:
        problem = Problem(old, f"got {show(value)}, must be true or false", f"write {row.instead} instead")
        return [], [problem]
    if row.new is not None and holder.get(row.new) is not None and value != AUTO:
        text = f"its replacement, {row.instead}, is given too"
        return [], [Problem(old, text, "remove the old key", ignorable=row.yields)]
    if value == AUTO or row.new is None or (row.is_switch and value is False):
        return [Renamed(old, None, row.instead if row.new is None and value is True else None)], []
    holder[row.new] = row.value(value)
    return [Renamed(old, (*row.section, row.new), row.instead)], []


def _legacy_zero(result: dict[str, Any]) -> list[Renamed]:
    """Rewrite ``zero_optimization: true``, which was the whole section once."""
    legacy = result.get("zero_optimization")
    if not isinstance(legacy, bool):
        return []
    result["zero_optimization"] = {"stage": int(legacy)}
    renamed = [Renamed(_ZERO, _ZERO, f'"zero_optimization": {{"stage": {int(legacy)}}}')]
    if legacy and "allgather_size" in result:
        result["zero_optimization"]["allgather_bucket_size"] = result.pop("allgather_size")
        instead = '"allgather_bucket_size" in "zero_optimization"'
        renamed.append(Renamed(("allgather_size",), (*_ZERO, "allgather_bucket_size"), instead))
    return renamed
