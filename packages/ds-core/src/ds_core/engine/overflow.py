"""What is known about steps whose gradients were inf or NaN: a record of each, a history, and few lines in the log.

The engine notes a record before the scaler learns of the step, so that the history an error shows ends with the step
that raised it::

    source = partition.find_overflow()
    history.note(describe(source, module, step=..., scale=..., norm=..., skipped=...))
    try:
        precision.after_step(skipped=skipped)
    except LossScaleError as error:
        raise history.explain(error) from error
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_core.interfaces.logical import logical_name
from ds_core.log import log_dist

if TYPE_CHECKING:
    from torch import nn

    from ds_core.errors import LossScaleError
    from ds_core.interfaces.partition import OverflowSource

__all__ = ["OverflowHistory", "OverflowRecord", "describe"]

CAPACITY = 32
_EVENTS_SHOWN = 8
_MODULES_SHOWN = 3
_RANKS_SHOWN = 8
_LONG_STREAK = 8
"""This many halvings in a row are no search for the scale any more."""


@dataclass(frozen=True)
class OverflowRecord:
    """One optimizer step whose gradient norm was inf or NaN.

    >>> print(OverflowRecord(12, 65536.0, "up.weight", "up", "Linear", (1,), float("inf"), skipped=True))
    step 12 at loss scale 65536: inf or NaN in up.weight (Linear 'up') on rank 1; skipped
    """

    step: int
    """Number of the step, counted from 1 as in ``StepRecord.global_step``."""
    scale: float
    """Loss scale of its backward; 1.0 where none is used."""
    parameter: str | None
    """Its first parameter, see :class:`ds_core.interfaces.partition.OverflowSource`; None: every gradient is finite."""
    module: str | None
    """Qualified name of the module that holds the parameter, ``""`` for the model itself; None: not known."""
    module_type: str | None
    """Name of that module's class."""
    ranks: tuple[int, ...] | None
    """Places in the data-parallel group that had it of their own; empty: only the sum has it; None: not known."""
    norm: float
    """Of the gradients, inf or NaN."""
    skipped: bool
    """False: the step was applied all the same."""

    @property
    def rank(self) -> int | None:
        """The first of ``ranks``; None where there is none, or it is not known."""
        return self.ranks[0] if self.ranks else None

    def __str__(self) -> str:
        return self._line(with_scale=self.scale != 1.0)

    def _line(self, *, with_scale: bool) -> str:
        when = f"step {self.step} at loss scale {self.scale:.12g}" if with_scale else f"step {self.step}"
        return f"{when}: {self._what()}; {'skipped' if self.skipped else 'applied'}"

    def _what(self) -> str:
        if self.parameter is None:
            return f"every gradient is finite, but the norm of all is {self.norm}"
        held_by = "" if self.module is None else f" ({_called(self.module, self.module_type)})"
        return f"inf or NaN in {self.parameter}{held_by}{self._where()}"

    def _where(self) -> str:
        if self.ranks is None:
            return ", rank not known"
        if not self.ranks:
            return ", finite on every rank, not in their sum"
        listing = ", ".join(map(str, self.ranks[:_RANKS_SHOWN]))
        if len(self.ranks) > _RANKS_SHOWN:
            listing += f", ... ({len(self.ranks)} in all)"
        return f" on rank{'s' if len(self.ranks) > 1 else ''} {listing}"


def _called(module: str, module_type: str | None) -> str:
    kind = module_type or "module"
    return f"{kind} {module!r}" if module else f"{kind}, the model itself"


def describe(
    source: OverflowSource, module: nn.Module, *, step: int, scale: float, norm: float, skipped: bool
) -> OverflowRecord:
    """Return the record of a step, with the module that holds the parameter ``source`` names.

    Args:
        source: what the partition found.
        module: the model; ``torch.compile`` may have wrapped it, or parts of it.
        step: see :class:`OverflowRecord`, as are the others.
    """
    name = module_type = None
    if source.parameter is not None:
        found = _holder(module, source.parameter)
        if found is not None:
            name, module_type = found
    return OverflowRecord(step, scale, source.parameter, name, module_type, source.ranks, norm, skipped)


def _holder(module: nn.Module, parameter: str) -> tuple[str, str] | None:
    """Return name and class of the module whose own parameter has the logical name ``parameter``."""
    for prefix, submodule in module.named_modules():
        for own, _ in submodule.named_parameters(recurse=False):
            if logical_name(f"{prefix}.{own}" if prefix else own) == parameter:
                return logical_name(prefix), type(submodule).__name__
    return None


class OverflowHistory:
    """The last overflows of one engine, and how often each module was the first.

    Each overflow is logged on rank 0 as it is noted: the 1st, 2nd, 4th, 8th, ... in a row where people look, those
    between at DEBUG. Under a loss scale they are expected now and then and go to INFO, else to WARNING.

    Args:
        capacity: how many records are kept.
        is_dynamic: the loss scale moves, so an overflow is how it learns. May be set later, too.

    >>> history = OverflowHistory(is_dynamic=True)
    >>> history.note(OverflowRecord(12, 65536.0, "up.weight", "up", "Linear", (1,), float("inf"), skipped=True))
    >>> history.worst_modules(1)
    [('up', 1)]
    """

    def __init__(self, capacity: int = CAPACITY, *, is_dynamic: bool = False) -> None:
        self._records: deque[OverflowRecord] = deque(maxlen=capacity)
        self.is_dynamic = is_dynamic
        self._of_module: Counter[str] = Counter()
        self._types: dict[str, str | None] = {}
        self._in_a_row = 0
        self.count = 0
        """Overflows since training began here, forgotten ones included."""

    @property
    def records(self) -> tuple[OverflowRecord, ...]:
        """The last ones, newest last."""
        return tuple(self._records)

    def note(self, record: OverflowRecord) -> None:
        """Remember ``record``, and log it if it is one of those to log."""
        self._records.append(record)
        self.count += 1
        self._in_a_row += 1
        if record.module is not None:
            self._of_module[record.module] += 1
            self._types[record.module] = record.module_type
        self._log(record)

    def good_step(self) -> None:
        """End a run of overflows: this step had none. Cheap, it is called in every step."""
        self._in_a_row = 0

    def worst_modules(self, n: int) -> list[tuple[str, int]]:
        """Return the ``n`` modules that were the first of an overflow most often, with how often, worst first."""
        return self._of_module.most_common(n)

    def explain(self, error: LossScaleError) -> LossScaleError:
        """Return ``error`` with the last events, the worst modules, and a fix that names where to look.

        A new error of the same kind; the one given is not changed. Its own fix, which cannot name a module, gives way.
        """
        lines = [error.what]
        shown = self.records[-_EVENTS_SHOWN:]
        if shown:
            lines.append(f"  last overflows, {len(shown)} of {self.count}:")
            # With the scale even where it is 1: that is how far it fell.
            lines += [f"    {record._line(with_scale=True)}" for record in shown]
        worst = self.worst_modules(_MODULES_SHOWN)
        if worst:
            lines.append("  first in, most often:")
            lines += [f"    {_called(name, self._types[name])}: {times} of {self.count}" for name, times in worst]
        place = f"look at {_called(worst[0][0], self._types[worst[0][0]])}: normalise its input, " if worst else ""
        fix = (
            f"{place}lower the learning rate, clip harder (gradient_clipping), "
            "or train in bf16 (bf16.enabled), which needs no loss scale; none of it cures a NaN in data or weights"
        )
        return type(error)("\n".join(lines), where=error.where, fix=fix)

    def _log(self, record: OverflowRecord) -> None:
        streak = self._in_a_row
        in_a_row = f" ({streak} in a row)" if streak > 1 else ""
        has_scale = self.is_dynamic or record.scale != 1.0
        level = logging.INFO if has_scale else logging.WARNING
        if streak & (streak - 1):  # not a power of two
            level = logging.DEBUG
        log_dist(f"{record._line(with_scale=has_scale)}{in_a_row}. {self._advice(record)}", level=level)

    def _advice(self, record: OverflowRecord) -> str:
        place = "" if record.module is None else f", and look at what goes into {record.module or 'the model'}"
        cure = f"lower the learning rate or clip (gradient_clipping){place}"
        if not record.skipped and record.parameter is not None:
            return f"The weights are now not finite: load the last checkpoint, {cure}"
        if self.is_dynamic and self._in_a_row < _LONG_STREAK:
            return "Expected now and then: the loss scale adapts"
        if self.is_dynamic:
            return f"Lowering the loss scale does not help: {cure}"
        if record.scale != 1.0:
            return "If it goes on, lower fp16.loss_scale, or set it to 0 to have it found"
        return f"If it goes on, {cure}"
