"""The two collectives of stages 1 and 2, each by the primitive that is fastest on the backend.

Note: measured. gloo's ``reduce_scatter_tensor`` takes 2 to 3 times its ``all_reduce`` at 4 to 50 MB, an
``all_to_all_single`` and a sum here 1.0 times. nccl has a ring of its own for each. So:

| | gloo | others |
|---|---|---|
| reduce-scatter | ``all_to_all_single``, then a local sum | ``reduce_scatter_tensor`` |
| all-gather | ``all_gather_into_tensor`` | ``all_gather_into_tensor`` |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup, Work

# torch 2.13 renamed them, and warns of the old names.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

__all__ = ["ReduceScatter", "all_gather", "reduce_scatter"]


class ReduceScatter(ABC):
    """A reduce-scatter under way."""

    @abstractmethod
    def wait(self) -> Tensor:
        """Return this rank's segment of the sum over the ranks, ``[segment]``, in the dtype of the input.

        On a GPU only the current stream waits.

        Raises:
            RuntimeError: the backend's: another rank is gone.
        """


class _Direct(ReduceScatter):
    def __init__(self, whole: Tensor, group: ProcessGroup) -> None:
        self._whole = whole  # the collective reads it until it is done
        self._mine = torch.empty(whole.numel() // dist.get_world_size(group), dtype=whole.dtype, device=whole.device)
        self._work: Work = _REDUCE_SCATTER(self._mine, whole, group=group, async_op=True)

    def wait(self) -> Tensor:
        self._work.wait()
        return self._mine


class _Exchanged(ReduceScatter):
    def __init__(self, whole: Tensor, group: ProcessGroup) -> None:
        self._whole, self._world_size = whole, dist.get_world_size(group)
        self._parts = torch.empty_like(whole)
        self._work: Work = dist.all_to_all_single(self._parts, whole, group=group, async_op=True)

    def wait(self) -> Tensor:
        self._work.wait()
        parts = self._parts.view(self._world_size, -1)
        if self._world_size == 2:
            return parts[0].add_(parts[1])
        # Sixteen bits: summed in fp32 and rounded once, instead of once per rank.
        return parts.sum(0, dtype=torch.float32 if parts.dtype.itemsize < 4 else None).to(parts.dtype)


def reduce_scatter(whole: Tensor, group: ProcessGroup) -> ReduceScatter:
    """Start to sum ``whole`` over the ranks and to give each its segment.

    Args:
        whole: ``[world_size * segment]``, contiguous; not to be written to before :meth:`ReduceScatter.wait`.
        group: all its ranks call this, in the same order.
    """
    kind = _Exchanged if dist.get_backend(group) == "gloo" else _Direct
    return kind(whole, group)


def all_gather(whole: Tensor, rank: int, group: ProcessGroup) -> Work:
    """Start to fill ``whole``, ``[world_size * segment]``, with the segments of all ranks; this rank's is in place."""
    segment = whole.numel() // dist.get_world_size(group)
    mine = whole[rank * segment : (rank + 1) * segment]
    work: Work = _ALL_GATHER(whole, mine, group=group, async_op=True)
    return work
