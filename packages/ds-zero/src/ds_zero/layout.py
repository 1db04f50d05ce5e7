"""How the parameters of a bucket lie in flat memory, and which rank owns what of it. Arithmetic only; loads no torch.

A bucket is ``world_size`` segments of equal length, one per rank: equal, because one collective moves them. Two ways to
lay parameters out:

- *cut*: one after another, zeros at the end. A parameter may lie in several segments. For optimizers that treat each
  element by itself.
- *whole*: every parameter lies in one segment, zeros at the end of each. For optimizers that need whole tensors.

Reference: Rajbhandari et al. 2019, "ZeRO", arXiv:1910.02054, section 5.1.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_core.partition.arithmetic import assign_writers

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Layout", "Share", "cut", "whole", "whole_each"]


@dataclass(frozen=True)
class Share:
    """The part of one parameter that one rank owns: an interval of it, at a place in that rank's segment."""

    start: int
    """First element, counted in the parameter row by row."""
    length: int
    """0: the rank owns nothing of it."""
    at: int
    """Where the interval begins in the segment."""


@dataclass(frozen=True)
class Layout:
    """One bucket in flat memory."""

    numels: tuple[int, ...]
    """Of each parameter."""
    offsets: tuple[int, ...]
    """Where each begins in the whole."""
    segment: int
    """Elements per rank."""
    world_size: int

    @property
    def total(self) -> int:
        """Elements of the whole, zeros included."""
        return self.segment * self.world_size

    def share(self, index: int, rank: int) -> Share:
        """Return what ``rank`` owns of parameter ``index``."""
        low, high = rank * self.segment, (rank + 1) * self.segment
        begin = self.offsets[index]
        first, last = max(begin, low), min(begin + self.numels[index], high)
        if first >= last:
            return Share(0, 0, 0)
        return Share(first - begin, last - first, first - low)

    def gaps(self) -> list[tuple[int, int]]:
        """Return the intervals of the whole that no parameter lies in."""
        found, at = [], 0
        for begin, numel in sorted(zip(self.offsets, self.numels, strict=True)):
            if not numel:
                continue
            if begin > at:
                found.append((at, begin))
            at = begin + numel
        return [*found, (at, self.total)] if at < self.total else found

    def owner(self, index: int) -> int:
        """Return the rank that owns the first element of parameter ``index``; 0 if there are no elements at all."""
        return min(self.offsets[index] // self.segment, self.world_size - 1) if self.segment else 0


def cut(numels: Sequence[int], world_size: int, *, align: int = 1) -> Layout:
    """Lay parameters out one after another.

    Args:
        numels: of each parameter, in the order of the bucket.
        world_size: ranks that share the bucket.
        align: segments have a multiple of so many elements.
    """
    offsets = [0, *itertools.accumulate(numels)]
    segment = -(-offsets[-1] // (world_size * align)) * align
    return Layout(tuple(numels), tuple(offsets[:-1]), segment, world_size)


def whole(numels: Sequence[int], world_size: int, *, align: int = 1, load: Sequence[int] | None = None) -> Layout:
    """Lay each parameter out in the segment of one rank, so that segments are about equally full.

    Args:
        numels: of each parameter, in the order of the bucket.
        world_size: ranks that share the bucket.
        align: segments have a multiple of so many elements.
        load: elements that each rank owns elsewhere; the fullest segment is that of the rank with the least.
    """
    owners = _spread(numels, world_size, load or [0] * world_size)
    filled = [0] * world_size
    within = []
    for numel, owner in zip(numels, owners, strict=True):
        within.append(filled[owner])
        filled[owner] += numel
    segment = -(-max(filled) // align) * align
    offsets = [owner * segment + at for owner, at in zip(owners, within, strict=True)]
    return Layout(tuple(numels), tuple(offsets), segment, world_size)


def _spread(numels: Sequence[int], world_size: int, load: Sequence[int]) -> list[int]:
    """Return the rank of each item: as many in all for each as can be, the most for the rank of least ``load``."""
    shares = assign_writers(numels, world_size)
    filled = [0] * world_size
    for numel, share in zip(numels, shares, strict=True):
        filled[share] += numel
    fullest_first = sorted(range(world_size), key=lambda share: (-filled[share], share))
    least_first = sorted(range(world_size), key=lambda rank: (load[rank], rank))
    rank_of = dict(zip(fullest_first, least_first, strict=True))
    return [rank_of[share] for share in shares]


def whole_each(buckets: Sequence[Sequence[int]], world_size: int) -> list[Layout]:
    """Lay out each bucket as :func:`whole`, so that over all of them the ranks own about equally much."""
    load = [0] * world_size
    layouts = []
    for numels in buckets:
        layouts.append(whole(numels, world_size, load=load))
        for index, numel in enumerate(numels):
            load[layouts[-1].owner(index)] += numel
    return layouts
