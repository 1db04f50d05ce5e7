"""The two collectives of stages 1 and 2, each by the primitive that is fastest on the backend.

Note: measured. gloo's ``reduce_scatter_tensor`` takes 2 to 3 times its ``all_reduce`` at 4 to 50 MB; that every rank
sends every other its segment, and each sums what it got, 0.7 times. Its ``all_gather_into_tensor`` takes twice what
that takes: it copies each segment once more. nccl has a ring of its own for both. So :data:`TABLE` says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup, Work

# torch 2.13 renamed them, and warns of the old names.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

__all__ = [
    "OTHERS",
    "SEGMENTS",
    "TABLE",
    "Awaited",
    "Primitives",
    "ReduceScatter",
    "all_gather",
    "primitives",
    "received_numel",
    "reduce_scatter",
]

SUMMED_AT_ONCE = 2**15
"""Elements: 128 KiB in fp32."""
SEGMENTS = "isend and irecv of segments"
"""Each rank sends each other rank the segment that it needs; what is to be summed, it sums itself."""


class Primitives(NamedTuple):
    """What of ``torch.distributed`` carries out the two collectives."""

    reduce_scatter: str
    all_gather: str


TABLE = {"gloo": Primitives(SEGMENTS, SEGMENTS)}
"""By backend, as torch calls it, for tensors in CPU memory."""
OTHERS = Primitives("reduce_scatter_tensor", "all_gather_into_tensor")
"""Of a backend that is not in the table, and for tensors elsewhere: gloo sends messages from CPU memory alone."""


def primitives(backend: str) -> Primitives:
    """Return what ``backend`` uses on a CPU."""
    return TABLE.get(backend, OTHERS)


def _chosen(group: ProcessGroup, device: torch.device) -> Primitives:
    return primitives(backend_of(group, device)) if device.type == "cpu" else OTHERS


def backend_of(group: ProcessGroup, device: torch.device) -> str:
    """Return the backend that moves tensors of ``device``, "" if none does: a group may have one for each kind."""
    return dict(pair.split(":") for pair in dist.get_backend_config(group).split(",")).get(device.type, "")


class Awaited(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Return when it is done; on a GPU only the current stream waits."""


def received_numel(segment: int, group: ProcessGroup, device: torch.device) -> int:
    """Return how many elements of memory :func:`reduce_scatter` receives into."""
    sends_segments = _chosen(group, device).reduce_scatter == SEGMENTS
    return segment * (dist.get_world_size(group) - 1) if sends_segments else segment


class ReduceScatter(ABC):
    """A reduce-scatter under way."""

    def __init__(self, whole: Tensor, received: Tensor, group: ProcessGroup) -> None:
        self.whole, self.received = whole, received
        rank, segment = dist.get_rank(group), whole.numel() // dist.get_world_size(group)
        self.own = whole[rank * segment : (rank + 1) * segment]

    @abstractmethod
    def wait(self) -> ReduceScatter:
        """Return when the others' part is here; on a GPU only the current stream waits.

        Raises:
            RuntimeError: the backend's: another rank is gone.
        """

    @abstractmethod
    def sum_into(self, shard: Tensor, *, add: bool) -> None:
        """Write this rank's segment of the sum over the ranks to ``shard``, or add it. After :meth:`wait`.

        Args:
            shard: ``[segment]``, in the dtype of the input or a wider one; may be this rank's segment of the input.
            add: add to what is there.
        """


class _Direct(ReduceScatter):
    def __init__(self, whole: Tensor, received: Tensor, group: ProcessGroup) -> None:
        super().__init__(whole, received, group)
        self._work: Work = _REDUCE_SCATTER(received, whole, group=group, async_op=True)

    def wait(self) -> ReduceScatter:
        self._work.wait()
        return self

    def sum_into(self, shard: Tensor, *, add: bool) -> None:
        if add:
            shard.add_(self.received)
        else:
            shard.copy_(self.received)


class _Exchanged(ReduceScatter):
    def __init__(self, whole: Tensor, received: Tensor, group: ProcessGroup) -> None:
        super().__init__(whole, received, group)
        segment = self.own.numel()
        others = _others(group)
        self._parts = [received[at * segment : (at + 1) * segment] for at in range(len(others))]
        self._work = _Transfers(group)
        for other, part in zip(others, self._parts, strict=True):
            self._work.receive(part, other)
            self._work.send(whole[other * segment : (other + 1) * segment], other)

    def wait(self) -> ReduceScatter:
        self._work.wait()
        return self

    def sum_into(self, shard: Tensor, *, add: bool) -> None:
        add_up([shard, self.own, *self._parts] if add else [self.own, *self._parts], shard)


def add_up(terms: Sequence[Tensor], into: Tensor) -> None:
    """Write the sum of ``terms`` to ``into``: all flat, of one length; ``into`` may be the first of them, in memory.

    Sums of three terms and more in sixteen bits are rounded once, instead of once per term.
    """
    first, *rest = terms
    if all(term.dtype == into.dtype for term in terms) and (into.dtype.itemsize >= 4 or len(rest) < 2):
        if rest:
            torch.add(first, rest.pop(0), out=into)
        else:
            into.copy_(first)
        for term in rest:
            into += term
        return
    # A piece at a time: what is cast stays in the processor's cache.
    wide = torch.promote_types(into.dtype, torch.float32)
    for at in range(0, into.numel(), SUMMED_AT_ONCE):
        piece = slice(at, at + SUMMED_AT_ONCE)
        total = first[piece].to(wide, copy=True)
        for term in rest:
            total += term[piece]
        into[piece] = total


class _Transfers:
    """Segments on their way between this rank and others."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._works: list[Work | None] = []

    def send(self, segment: Tensor, to: int) -> None:
        if segment.numel():
            self._works.append(dist.isend(segment, group=self._group, group_dst=to))

    def receive(self, segment: Tensor, sender: int) -> None:
        if segment.numel():
            self._works.append(dist.irecv(segment, group=self._group, group_src=sender))

    def wait(self) -> None:
        for work in self._works:
            assert work is not None, "this rank is not in its group"
            work.wait()


def _others(group: ProcessGroup) -> list[int]:
    """Return the other ranks of ``group``, each rank another one first, so that not all send to the same."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    return [(rank + step) % world_size for step in range(1, world_size)]


def reduce_scatter(whole: Tensor, received: Tensor, group: ProcessGroup) -> ReduceScatter:
    """Start to sum ``whole`` over the ranks and to give each its segment.

    Args:
        whole: ``[world_size * segment]``, contiguous; not to be written to before :meth:`ReduceScatter.wait`.
        received: ``[received_numel(segment)]`` of the same dtype, to be left alone until the sum was taken.
        group: all its ranks call this, in the same order.
    """
    sends_segments = _chosen(group, whole.device).reduce_scatter == SEGMENTS
    return (_Exchanged if sends_segments else _Direct)(whole, received, group)


def all_gather(whole: Tensor, group: ProcessGroup) -> Awaited:
    """Start to fill ``whole``, ``[world_size * segment]``, with the segments of all ranks; this rank's is in place."""
    rank, segment = dist.get_rank(group), whole.numel() // dist.get_world_size(group)
    mine = whole[rank * segment : (rank + 1) * segment]
    if _chosen(group, whole.device).all_gather != SEGMENTS:
        work: Work = _ALL_GATHER(whole, mine, group=group, async_op=True)
        return work
    transfers = _Transfers(group)
    for other in _others(group):
        transfers.receive(whole[other * segment : (other + 1) * segment], other)
        transfers.send(mine, other)
    return transfers
