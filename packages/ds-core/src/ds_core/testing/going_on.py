"""What must be equal, and how nearly, when a run goes on from a checkpoint.

:func:`held` copies what a rank has, :func:`differences` compares the ranks that saved, and went on, with those that
loaded. :mod:`ds_core.testing.anywhere` makes both runs.

Note: the bound in fp32. Two places take the gradient of the same samples and add it up in another order. An element of
it is a mean of 48 products, whose factors are sums of at most 13 + 13 + 5 terms of size 1 or less, so each side is off
by less than (48 + 31) 2**-24 < 2**-17, and the two differ by r = 2**-16. This holds for every order of adding 48 terms,
whoever adds which: autograd over a micro-batch, a window over its micro-batches, an all-reduce over the ranks in a
ring, or a reduce-scatter, be it a ring or an exchange that each rank adds up for its own elements; at stage 2 once per
micro-batch, and then over the window. Stages also read elements from other places of memory, where a kernel may take a
vector or its tail; what an update itself rounds is s, below. Let e be the largest difference of two weights
(or of the model's buffer, a running mean of weights), and L the largest sum of absolute second derivatives of the loss
in one row, by weights and buffer: then gradients differ by at most d = L e + r in any element. Adam's moments,
corrected for their bias, are means of gradients or of their squares with weights that sum up to 1 (or the largest of
such), so the first differs by at most the largest d so far, and so does the root of the second, by the triangle
inequality of a norm. With eps = 1 and gradients below 1 the update lr m / (sqrt(v) + eps) has slope at most lr in
either: it differs by at most 2 lr d. What the optimizer itself rounds, of weights below 1, is less than s = 2**-23 a
step on both sides. Hence

    e(t + 1) <= (1 + 2 lr L) e(t) + 2 lr r + s,    e(20) <= (2 lr r + s) ((1 + 2 lr L)**20 - 1) / (2 lr L),

which is :data:`WEIGHT_BOUND` with lr = 0.01 and L = :data:`CURVATURE`. Moments differ by at most L e + r, squares by
twice that, losses by e times the sum of absolute first derivatives, :data:`SLOPE`, and r. :func:`assumptions` measures
what is assumed; a test compares. Clipping is at twice the norm that gradients have: it is computed, and does nothing.

Note: the bound in low precision. There the loss curve is compared. Masters that differ by anything may be rounded to
neighbours, 2 u apart (u = 2**-8 in bf16, 2**-11 in fp16), and so may whatever is computed of them. From weights to
output four roundings follow each other (inner weight, hidden, outer weight, output), and the absolute products they
enter sum up to at most 4: an output differs by at most 4 x 2 u x 4 = 32 u. The slope of (out - y)**2 / 16 is |out - y|
/ 8, on average at most 1/2: a loss differs by at most 16 u, where all roundings err to one side. They err to either,
independently, and a step's loss is a mean over 48 samples: :data:`LOSS_BOUND` is an eighth of this, 2 u (a 128th in
bf16, of losses of about 0.3), at which the rounding errors of a sample need not even cancel among each other.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds_core.interfaces.logical import MASTER, WEIGHT, Chunk, LogicalTensor, Piece
from ds_core.testing.resume import unequal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ds_core.interfaces.checkpoint import CheckpointReader

__all__ = ["CURVATURE", "LOSS_BOUND", "SLOPE", "STEPS", "WEIGHT_BOUND", "Held", "Run", "Steps", "differences", "held"]

STEPS = 20
CLIENT_STATE = {"epoch": 2, "key": (1, {2: 3})}
LR = (0.01, 0.005)
"""The highest of each group. The schedule rises while the checkpoint is written, and falls after it."""
CURVATURE = 2.0
SLOPE = 4.0
_GROWTH = 1 + 2 * LR[0] * CURVATURE
_ROUNDING = 2.0**-16
WEIGHT_BOUND = (2 * LR[0] * _ROUNDING + 2.0**-23) * (_GROWTH**STEPS - 1) / (_GROWTH - 1)
SLOT_BOUND = 2 * (CURVATURE * WEIGHT_BOUND + _ROUNDING)
LOSS_BOUND = {
    "fp32": SLOPE * WEIGHT_BOUND + _ROUNDING,
    "fp16": 2 * 2.0**-11,
    "bf16": 2 * 2.0**-8,
    "torch_autocast": 2 * 2.0**-8,
}


@dataclass
class Held:
    """What one rank has."""

    tensors: list[tuple[LogicalTensor, Chunk, Tensor]]
    numbers: dict[str, Any]
    """Schedule, scaler, counters, data position, options and values of the optimizer, by names."""
    random: Tensor


@dataclass
class Steps:
    """What :data:`STEPS` steps were like, on one rank."""

    losses: list[list[float]] = field(default_factory=list)
    """Of each micro-batch, by step."""
    rates: list[list[float]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)


@dataclass
class Run:
    """One rank's account of a case: of the source, or of the target."""

    start: Held
    """When the checkpoint was written, or had been read."""
    steps: Steps
    end: Held
    stored: list[dict[str, Tensor]] = field(default_factory=list)
    """Rank 0 of the target: the whole tensors in the checkpoint, and in the one that it saved again."""
    client_state: Any = None


def held(engine: Any) -> Held:
    """Return copies of all that this rank has and resuming must bring back."""
    parts, optimizer = engine.parts, engine.basic_optimizer
    tensors = [
        (piece.of, piece.chunk, piece.data) for piece in (*parts.partition.pieces(), *parts.partition.gradient_pieces())
    ]
    values = {}
    for piece in parts.partition.optimizer_pieces():
        for slot, value in optimizer.state.get(piece.data, {}).items():
            if not isinstance(value, Tensor):
                values[f"{piece.of.name} {slot}"] = value
                continue
            whole = value.shape != piece.data.shape
            shape = tuple(value.shape) if whole else piece.of.shape
            of = LogicalTensor(piece.of.name, slot, shape, _word(value))
            tensors.append((of, Chunk.whole(shape) if whole else piece.chunk, value))
    numbers = {
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
        "slot values": values,
        "schedule": None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict(),
        "scaler": {"scale": engine.cur_scale, **parts.precision.scaler.state_dict()},
        "data": None if engine.training_dataloader is None else engine.training_dataloader.state_dict(),
        "in window": parts.accumulation.in_window,
        **{name: getattr(engine, name) for name in ("global_steps", "global_samples", "skipped_steps", "micro_steps")},
    }
    copies = [(of, chunk, data.detach().clone()) for of, chunk, data in tensors]
    return Held(copies, copy.deepcopy(numbers), torch.get_rng_state())


def _word(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def stored(reader: CheckpointReader) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint as a whole."""
    pieces = [
        Piece(of, Chunk.whole(of.shape), torch.empty(of.shape, dtype=getattr(torch, of.dtype)))
        for of in reader.tensors()
    ]
    reader.read(pieces)
    return {_key(piece.of): piece.data for piece in pieces}


def _key(of: LogicalTensor) -> str:
    return f"{of.kind} {of.name}" + ("" if of.rank is None else f" of rank {of.rank}")


def whole(ranks: Sequence[Held], found: list[str], when: str) -> dict[str, Tensor]:
    """Put the ranks' chunks together; what two of them have, and is not the same, is added to ``found``."""
    tensors: dict[str, Tensor] = {}
    filled: dict[str, Tensor] = {}
    for rank, of_rank in enumerate(ranks):
        for of, chunk, data in of_rank.tensors:
            key = _key(of)
            if key not in tensors:
                tensors[key] = torch.zeros(of.shape, dtype=getattr(torch, of.dtype))
                filled[key] = torch.zeros(of.shape, dtype=torch.bool)
            flat = data.reshape(-1)
            for span in chunk.spans():
                at = tuple(slice(a, a + n) for a, n in zip(span.box.start, span.box.size, strict=True))
                mine = flat[span.offset : span.offset + span.box.numel].view(span.box.size)
                both = filled[key][at]
                if not torch.equal(mine[both], tensors[key][at][both]):
                    found.append(f"{when}: rank {rank} has another {key} than a rank before it")
                tensors[key][at] = mine
                filled[key][at] = True
    found += [f"{when}: no rank has all of {key}" for key, mask in filled.items() if not mask.all()]
    return tensors


def differences(source: Sequence[Run], target: Sequence[Run], *, precision: str, same_place: bool) -> list[str]:
    """Return where the run of ``target`` is not that of ``source`` gone on, in words; both are by rank.

    Args:
        source: what the ranks had that saved, and were like without having stopped.
        target: what the ranks had that loaded.
        precision: the entry name; says which bound.
        same_place: every bit must be equal.
    """
    found: list[str] = []
    saved = whole([of_rank.start for of_rank in source], found, "saved")
    found += [f"saved: {key} is not finite" for key, value in saved.items() if not value.isfinite().all()]
    loaded = whole([of_rank.start for of_rank in target], found, "loaded")
    in_folder, again = target[0].stored
    for what, tensors in (("in the folder", in_folder), ("loaded", loaded), ("saved again", again)):
        found += [f"{what}: {key}" for key in unequal(tensors, saved)]
    for rank, of_rank in enumerate(target):
        found += [f"loaded: {key} on rank {rank}" for key in unequal(of_rank.start.numbers, source[0].start.numbers)]
        if rank < len(source) and not torch.equal(of_rank.start.random, source[rank].start.random):
            found.append(f"loaded: the random generator of rank {rank}")
        if of_rank.client_state != CLIENT_STATE:
            found.append(f"loaded: client state {of_rank.client_state}")
        if of_rank.steps.rates != source[0].steps.rates:
            found.append(f"steps: learning rates on rank {rank}")
        if of_rank.steps.scales != source[0].steps.scales:
            found.append(f"steps: loss scales on rank {rank}")
        expected = {
            **source[0].end.numbers,
            **({} if same_place else {"micro_steps": of_rank.end.numbers["micro_steps"]}),
        }
        found += [f"end: {key} on rank {rank}" for key in unequal(of_rank.end.numbers, expected)]
    curve, expected_curve = _curve(target), _curve([*source])
    if len(curve) != STEPS or len(expected_curve) != STEPS:
        found.append(f"steps: {len(curve)} of {STEPS}, {len(expected_curve)} without having stopped")
    end, expected_end = (whole([of_rank.end for of_rank in side], found, "end") for side in (target, source))
    if same_place:
        if [of_rank.steps.losses for of_rank in target] != [of_rank.steps.losses for of_rank in source]:
            found.append("steps: losses are not those of the run that was not stopped")
        return found + [f"end: {key}" for key in unequal(end, expected_end)]
    off = max((abs(a - b) for a, b in zip(curve, expected_curve, strict=False)), default=math.inf)
    # Not "off > bound": a NaN is not within it.
    if not off <= LOSS_BOUND[precision]:
        found.append(f"steps: a loss is {off:.2g} off, bound {LOSS_BOUND[precision]:.2g}")
    return found + (_far_off(end, expected_end) if precision == "fp32" else [])


def _curve(target: Sequence[Run]) -> list[float]:
    """Return each step's mean over ranks and micro-batches."""
    by_step = zip(*(of_rank.steps.losses for of_rank in target), strict=True)
    return [math.fsum(map(math.fsum, ranks)) / sum(map(len, ranks)) for ranks in by_step]


def _far_off(end: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    found = [f"end: {key} is missing on one side" for key in sorted(end.keys() ^ expected.keys())]
    for key in sorted(end.keys() & expected.keys()):
        kind = key.partition(" ")[0]
        exact = not expected[key].is_floating_point() or kind == "step"
        bound = 0.0 if exact else WEIGHT_BOUND if kind in (MASTER, WEIGHT, "buffer") else SLOT_BOUND
        off = (end[key].double() - expected[key].double()).abs().max().item() if end[key].numel() else 0.0
        if not off <= bound:
            found.append(f"end: {key} is {off:.2g} off, bound {bound:.2g}")
    return found
