"""Weights in flat memory, a bucket at a time, and the shard of each that this rank updates.

Parameters stay whole on every rank, as views of the flat memory. The optimizer updates this rank's segment: of the
weights themselves, or of masters where the plan keeps them. :meth:`ShardedWeights.publish` brings the segments to all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.autograd.graph import increment_version

from ds_core.partition.stored import follow_weight
from ds_zero.collectives import all_gather

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

    from ds_core.interfaces.precision import ParameterDtypes
    from ds_zero.layout import Layout, Share

__all__ = ["Shard", "ShardedWeights"]


class Shard:
    """What this rank updates of one parameter."""

    def __init__(self, param: nn.Parameter, share: Share, weight: Tensor, updated: Tensor) -> None:
        self.param, self.share = param, share
        self.weight = weight
        """Its part of the parameter itself, flat."""
        self.updated = updated
        """What the optimizer updates: its part of the master, or the same memory as ``weight``."""

    @property
    def has_master(self) -> bool:
        return self.weight.dtype != self.updated.dtype


class ShardedWeights:
    """The trained parameters of one engine at stage 1 or 2."""

    def __init__(
        self,
        buckets: Sequence[tuple[Sequence[nn.Parameter], Layout]],
        dtypes: Mapping[nn.Parameter, ParameterDtypes],
        group: ProcessGroup,
        *,
        keep_shapes: bool,
    ) -> None:
        """Move the parameters into flat memory, cast to what is stored; masters keep the digits they have now.

        Args:
            buckets: parameters of equal dtypes, and how they lie.
            dtypes: of each, after the plan.
            group: the ranks that share them.
            keep_shapes: the optimizer gets its tensors in the shape of the parameter; else flat.
        """
        self._group, self._rank = group, dist.get_rank(group)
        self._flats: list[Tensor] = []
        self.shards: dict[nn.Parameter, Shard] = {}
        for params, layout in buckets:
            self._move(params, layout, dtypes[params[0]], keep_shapes=keep_shapes)
        self._versions: list[int] = []
        self.note_versions()

    @torch.no_grad()
    def _move(
        self, params: Sequence[nn.Parameter], layout: Layout, dtypes: ParameterDtypes, *, keep_shapes: bool
    ) -> None:
        flat = torch.zeros(layout.total, dtype=dtypes.stored, device=params[0].device)
        master = None
        if dtypes.master is not None:
            master = torch.zeros(layout.segment, dtype=dtypes.master, device=flat.device)
        self._flats.append(flat)
        first = self._rank * layout.segment
        for place, param in enumerate(params):
            share = layout.share(place, self._rank)
            weight = flat[first + share.at : first + share.at + share.length]
            updated = weight
            if master is not None:
                updated = master[share.at : share.at + share.length]
                updated.copy_(param.data.reshape(-1)[share.start : share.start + share.length])
            whole = flat[layout.offsets[place] : layout.offsets[place] + param.numel()].view(param.shape)
            whole.copy_(param.data)
            param.data = whole
            if keep_shapes:
                updated = updated.view(param.shape if share.length == param.numel() else (0, *param.shape[1:]))
            # Optimizers look at requires_grad, and at marks that their users put on parameters.
            updated = updated.detach().requires_grad_()
            vars(updated).update(vars(param))
            self.shards[param] = Shard(param, share, weight, updated)

    def _with_master(self) -> Iterator[Shard]:
        return (shard for shard in self.shards.values() if shard.has_master)

    @torch.no_grad()
    def publish(self) -> None:
        """Cast masters into this rank's segments, and bring every segment to every rank. Collective."""
        cast = [shard for shard in self._with_master() if shard.share.length]
        if cast:
            torch._foreach_copy_([shard.weight for shard in cast], [shard.updated.detach().view(-1) for shard in cast])
        works = [all_gather(flat, self._group) for flat in self._flats]
        for work in works:
            work.wait()
        # The parameters were written to behind autograd's back: a graph that still needs the old ones must notice.
        increment_version(list(self.shards))
        self.note_versions()

    def note_versions(self) -> None:
        """Take the parameters as they are now for what was published: later writes to them are somebody else's."""
        self._versions = [param._version for param in self.shards]

    def follow_writes(self) -> None:
        """Begin anew from parameters that somebody else wrote to in place since the last :meth:`publish`."""
        now = [param._version for param in self.shards]
        if now == self._versions:
            return
        self._refresh(
            shard
            for shard, new, old in zip(self.shards.values(), now, self._versions, strict=True)
            if new != old and shard.has_master
        )
        self.note_versions()

    def refresh(self) -> None:
        """Let every master follow its part of the parameter, see :func:`ds_core.partition.stored.follow_weight`."""
        self._refresh(self._with_master())
        self.note_versions()

    def _refresh(self, shards: Iterator[Shard]) -> None:
        for shard in shards:
            follow_weight(shard.updated.detach().view(-1), shard.weight)

    def drop_gradients(self) -> None:
        """Let the gradients of what the optimizer updates go."""
        for shard in self.shards.values():
            shard.updated.grad = None
