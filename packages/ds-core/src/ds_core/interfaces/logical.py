"""Logical tensors: the one vocabulary in which partitions describe what they hold and checkpoints store it.

A logical tensor is named by (parameter or buffer name, kind) and has a global shape and dtype. What a rank holds of
it is a :class:`Chunk`: a box inside the tensor (usually the whole of it), and a flat interval inside that box. A
checkpoint written in any chunks is read in any others by :func:`overlaps`, so every stage and world size reads every
other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

__all__ = [
    "BUFFER",
    "GRADIENT",
    "MASTER",
    "WEIGHT",
    "Box",
    "Chunk",
    "LogicalTensor",
    "Overlap",
    "Piece",
    "Span",
    "logical_name",
    "overlaps",
]

WEIGHT = "weight"
BUFFER = "buffer"
MASTER = "master"
GRADIENT = "gradient"
"""Kinds. An optimizer slot's kind is the optimizer's own word for it, such as ``exp_avg``."""


def logical_name(name: str) -> str:
    """Return the name of a parameter or module without what ``torch.compile`` puts in between.

    >>> logical_name("_orig_mod.layers.0.weight")
    'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


@dataclass(frozen=True)
class LogicalTensor:
    """One tensor of the whole job, wherever its elements live.

    A partial gradient (kind ``gradient``) belongs to one rank alone, and says which.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    """torch's own word without the prefix, such as ``float32``."""
    rank: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: ``start[d] <= index[d] < start[d] + size[d]``."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)


@dataclass(frozen=True)
class Span:
    """A box that lies contiguous, row by row, at ``offset`` elements from the start of a chunk's storage."""

    box: Box
    offset: int


@dataclass(frozen=True)
class Chunk:
    """A flat interval of ``length`` elements from ``offset``, counted row by row inside ``box``."""

    box: Box
    offset: int
    length: int

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Chunk:
        """Return the chunk that is the whole tensor of ``shape``."""
        box = Box((0,) * len(shape), tuple(shape))
        return cls(box, 0, box.numel)

    @property
    def is_whole_box(self) -> bool:
        return self.offset == 0 and self.length == self.box.numel

    def spans(self) -> Iterator[Span]:
        """Yield the interval as at most ``2 * ndim - 1`` dense boxes, in storage order, none of them empty.

        A row-major interval is a few partial rows around a block of full ones, at each dimension.
        """
        if self.length == 0:
            return
        at = 0
        for start, size in _dense(self.box.size, self.offset, self.offset + self.length):
            box = Box(tuple(b + s for b, s in zip(self.box.start, start, strict=True)), size)
            yield Span(box, at)
            at += box.numel


def _dense(size: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (start, size) of the dense boxes of flat interval [begin, end) of a row-major tensor of ``size``."""
    if begin >= end:
        return
    if begin == 0 and end == math.prod(size):
        yield (0,) * len(size), size
        return
    # Not the whole tensor and not empty, so there is a dimension to split.
    row = math.prod(size[1:])
    first, last = begin // row, (end - 1) // row
    if first == last:
        for start, inner in _dense(size[1:], begin - first * row, end - first * row):
            yield (first, *start), (1, *inner)
        return
    full_from = first + (begin % row > 0)
    full_to = last + (end % row == 0)
    if full_from > first:
        for start, inner in _dense(size[1:], begin - first * row, row):
            yield (first, *start), (1, *inner)
    if full_to > full_from:
        yield (full_from, *(0,) * (len(size) - 1)), (full_to - full_from, *size[1:])
    if full_to == last:
        for start, inner in _dense(size[1:], 0, end - last * row):
            yield (last, *start), (1, *inner)


@dataclass(frozen=True)
class Overlap:
    """Elements two chunks of one tensor share: a box seen from a span of each side.

    ``source`` and ``target`` are the spans' storage (offset, box size); the slices cut the shared box out of each.
    """

    source: Span
    source_slices: tuple[slice, ...]
    target: Span
    target_slices: tuple[slice, ...]
    numel: int


def overlaps(source: Chunk, target: Chunk) -> Iterator[Overlap]:
    """Yield every part that ``source`` and ``target``, chunks of the same tensor, have in common.

    Each shared element occurs in exactly one overlap.
    """
    targets = list(target.spans())
    for src in source.spans():
        for dst in targets:
            # A tensor without dimensions has one element, which every non-empty chunk of it shares.
            starts = tuple(map(max, src.box.start, dst.box.start))
            ends = tuple(
                min(a + n, b + m)
                for a, n, b, m in zip(src.box.start, src.box.size, dst.box.start, dst.box.size, strict=True)
            )
            sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
            if any(size <= 0 for size in sizes):
                continue
            yield Overlap(
                src,
                tuple(slice(s - o, s - o + n) for s, o, n in zip(starts, src.box.start, sizes, strict=True)),
                dst,
                tuple(slice(s - o, s - o + n) for s, o, n in zip(starts, dst.box.start, sizes, strict=True)),
                math.prod(sizes),
            )


@dataclass(frozen=True)
class Piece:
    """A chunk of a logical tensor as this rank holds it in memory.

    ``data`` has ``chunk.length`` elements in row-major order of the chunk; for a whole box it may have the box's
    shape and any strides. Loading fills it in place.
    """

    of: LogicalTensor
    chunk: Chunk
    data: Tensor
    writer: int = 0
    """The one rank that writes this chunk, where several hold a copy."""


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds, as one rank sees it."""

    pieces: Sequence[Piece]
    state: Mapping[str, Any]
    """JSON, equal on every rank: counters, schedule, scaler, options of the optimizer's groups, client state."""
    rank_state: Mapping[str, Any]
    """JSON of this rank alone: random generators."""
