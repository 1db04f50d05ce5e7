"""Which dtype everything in an engine has: read from its tensors where there are any, from the plan where not (P12)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ds_core.interfaces.logical import MASTER

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from ds_core.engine.face import EngineFace
    from ds_core.interfaces.precision import ParameterDtypes, Precision

__all__ = ["GroupPrecision", "PrecisionReport", "precision_report"]

_NOTHING = "-"
_COLUMNS = ("group", "parameters", "elements", "storage", "compute", "gradient", "reduction", "master", "optimizer")


@dataclass(frozen=True)
class GroupPrecision:
    """The dtypes of one parameter group, or of the parameters outside of all groups.

    Each is a sorted tuple of torch's words such as ``("bfloat16",)``, longer where parameters differ, empty where
    there is no such thing.
    """

    name: str
    """Index of the group; ``frozen``, or ``no optimizer`` for what requires grad and is in no group."""
    parameters: int
    elements: int
    """Of the whole parameters, wherever they live."""
    storage: tuple[str, ...]
    """Of the parameters themselves."""
    compute: tuple[str, ...]
    """Of matrix products with them: autocast's where it casts, else as stored."""
    gradient: tuple[str, ...] = ()
    """Gradients summed over micro-batches."""
    reduction: tuple[str, ...] = ()
    """Gradients inside a collective."""
    master: tuple[str, ...] = ()
    """The optimizer's own copies; empty: it updates the parameters themselves."""
    optimizer: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(slot, dtypes) of the state the optimizer has by now; what is no tensor has the name of its type."""


@dataclass(frozen=True)
class PrecisionReport:
    """What ``engine.precision_report()`` returns; prints as a table."""

    precision: str
    """Class of the precision, as in ``engine.report()``."""
    world_size: int
    """Ranks that gradients are reduced over."""
    loss_scale: float
    """Of the coming backward."""
    is_loss_scale_dynamic: bool
    """It moves while training."""
    steps: int
    """Optimizer steps so far, with the skipped ones."""
    skipped_steps: int
    autocast: str | None
    """Forward runs under ``torch.autocast`` to this."""
    input_cast: str | None
    """Floating-point inputs of forward are cast to this."""
    buffers: tuple[str, ...]
    """Dtypes of the model's buffers."""
    overflow_policy: str
    """What happens to a step whose gradients hold inf or NaN, in words."""
    rows: tuple[GroupPrecision, ...]
    """One per parameter group, then the parameters outside of them."""

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON."""
        found = {**vars(self), "buffers": list(self.buffers)}
        found["rows"] = [
            {
                **{key: list(value) if isinstance(value, tuple) else value for key, value in vars(group).items()},
                "optimizer": {slot: list(dtypes) for slot, dtypes in group.optimizer},
            }
            for group in self.rows
        ]
        return found

    def __str__(self) -> str:
        return "\n".join([*_aligned(self._facts()), "", *_aligned(self._table(), right=(1, 2))])

    def _facts(self) -> list[list[str]]:
        scale = "none"
        if self.is_loss_scale_dynamic or self.loss_scale != 1.0:
            scale = f"{self.loss_scale:.12g}, {'moves' if self.is_loss_scale_dynamic else 'fixed'}"
        return [
            ["precision", self.precision],
            ["loss scale", scale],
            ["skipped steps", f"{self.skipped_steps} of {self.steps}"],
            ["autocast", self.autocast or "none"],
            ["inputs cast to", self.input_cast or "not cast"],
            ["buffers", _listing(self.buffers, "none")],
            ["ranks", str(self.world_size) if self.world_size > 1 else "1, so nothing is reduced"],
            ["on overflow", self.overflow_policy],
        ]

    def _table(self) -> list[list[str]]:
        rows = [list(_COLUMNS)]
        for group in self.rows:
            dtypes = (group.storage, group.compute, group.gradient, group.reduction, group.master)
            rows.append(
                [
                    group.name,
                    f"{group.parameters:,}",
                    f"{group.elements:,}",
                    *(_listing(of, _NOTHING) for of in dtypes),
                    self._state(group),
                ]
            )
        return rows

    def _state(self, group: GroupPrecision) -> str:
        if not group.gradient:
            return _NOTHING
        if not group.optimizer:
            # SGD without momentum never has any.
            return "none yet" if self.steps == self.skipped_steps else "none"
        by_dtype: dict[str, list[str]] = {}
        for slot, dtypes in group.optimizer:
            by_dtype.setdefault(_listing(dtypes, _NOTHING), []).append(slot)
        return "; ".join(f"{dtypes} ({', '.join(slots)})" for dtypes, slots in by_dtype.items())


def precision_report(engine: EngineFace) -> PrecisionReport:
    """Return which dtype everything in ``engine`` has at this moment. No communication, nothing is changed.

    Stored weights, masters, optimizer state and buffers are asked for their dtype; what gradients are accumulated and
    reduced in, and what is computed in, is the plan's word.

    >>> import torch, ds_core
    >>> engine, *_ = ds_core.initialize(
    ...     model=torch.nn.Linear(2, 1), config={"train_batch_size": 1, "optimizer": {"type": "SGD"}}
    ... )
    >>> precision_report(engine).rows[0].gradient
    ('float32',)
    """
    parts, progress = engine.parts, engine.progress
    inputs, precision = parts.partition.inputs, parts.precision
    plan = inputs.plan
    is_dynamic = _is_dynamic(precision)
    return PrecisionReport(
        precision=type(precision).__name__,
        world_size=parts.world_size,
        loss_scale=precision.scaler.scale,
        is_loss_scale_dynamic=is_dynamic,
        steps=progress.global_steps,
        skipped_steps=progress.skipped_steps,
        autocast=None if plan.autocast is None else _word(plan.autocast),
        input_cast=None if plan.input_cast is None else _word(plan.input_cast),
        buffers=_words(buffer.dtype for buffer in inputs.module.buffers()),
        overflow_policy=_policy(precision, is_dynamic),
        rows=(*_optimized(engine), *_others(engine)),
    )


def _is_dynamic(precision: Precision) -> bool:
    # DeepSpeed's scalers say it by this attribute; the seam asks a scaler for no such thing.
    return bool(getattr(precision.scaler, "dynamic", False))


def _policy(precision: Precision, is_dynamic: bool) -> str:
    # The rule only answers, so it can be asked.
    if not precision.overflowed(math.nan):
        return "a step with inf or NaN is applied, as in plain PyTorch, and logged"
    learns = ", and the loss scale learns of it" if is_dynamic else ""
    return f"a step with inf or NaN is skipped and logged{learns}"


def _optimized(engine: EngineFace) -> list[GroupPrecision]:
    partition = engine.parts.partition
    dtypes, autocast = partition.inputs.dtypes, partition.inputs.plan.autocast
    optimizer = engine.basic_optimizer
    # One piece per tensor of the groups, in the same order: it says whether that is a master.
    pieces = iter(partition.optimizer_pieces())
    found = []
    groups = zip(partition.inputs.param_groups, partition.optimizer_groups(), strict=True)
    for index, (given, updated) in enumerate(groups):
        params: Sequence[nn.Parameter] = given["params"]
        tensors: Sequence[Tensor] = updated["params"]
        kinds = [next(pieces).of.kind for _ in tensors]
        masters = [tensor for tensor, kind in zip(tensors, kinds, strict=True) if kind == MASTER]
        states = [] if optimizer is None else [optimizer.state.get(tensor, {}) for tensor in tensors]
        found.append(
            _row(
                str(index),
                params,
                autocast,
                of=[dtypes[param] for param in params],
                master=_words(tensor.dtype for tensor in masters),
                optimizer=_slots(states),
            )
        )
    return found


def _others(engine: EngineFace) -> list[GroupPrecision]:
    """Return the rows of parameters that no group has."""
    inputs = engine.parts.partition.inputs
    grouped = {param for group in inputs.param_groups for param in group["params"]}
    rest = [param for param in inputs.module.parameters() if param not in grouped]
    kinds = {
        "no optimizer": [param for param in rest if param.requires_grad],
        "frozen": [param for param in rest if not param.requires_grad],
    }
    return [_row(name, params, inputs.plan.autocast) for name, params in kinds.items() if params]


def _row(
    name: str,
    params: Sequence[nn.Parameter],
    autocast: torch.dtype | None,
    *,
    of: Sequence[ParameterDtypes] = (),
    master: tuple[str, ...] = (),
    optimizer: tuple[tuple[str, tuple[str, ...]], ...] = (),
) -> GroupPrecision:
    return GroupPrecision(
        name=name,
        parameters=len(params),
        elements=sum(param.numel() for param in params),
        storage=_words(param.dtype for param in params),
        compute=_words(_computes_in(param.dtype, autocast) for param in params),
        gradient=_words(dtypes.accumulate for dtypes in of),
        reduction=_words(dtypes.reduce for dtypes in of),
        master=master,
        optimizer=optimizer,
    )


def _computes_in(stored: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    # Autocast leaves integers and float64 alone.
    return stored if autocast is None or not stored.is_floating_point or stored == torch.float64 else autocast


def _slots(states: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    found: dict[str, set[str]] = {}
    for state in states:
        for slot, value in state.items():
            word = _word(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
            found.setdefault(slot, set()).add(word)
    return tuple((slot, tuple(sorted(words))) for slot, words in found.items())


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _words(dtypes: Iterable[torch.dtype]) -> tuple[str, ...]:
    return tuple(sorted({_word(dtype) for dtype in dtypes}))


def _listing(words: Sequence[str], otherwise: str) -> str:
    return ", ".join(words) or otherwise


def _aligned(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Return each row as a line, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
