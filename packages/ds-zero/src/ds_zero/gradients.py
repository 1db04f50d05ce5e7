"""Gradients that are reduced onto the ranks that own them: buckets come and go, each rank keeps its shards.

Stage 1 sends in the backward that ends a window. Until then every bucket stays, with full gradients of this rank; what
was summed then takes the place of this rank's segment there.

Stage 2 sends in every backward. A bucket has memory from its first gradient until its collective is done; then the room
goes to the next bucket, so that only a few have memory at a time; the last few travel during the next forward. What
stays is the shard: this rank's segment of the sum, to which later backwards of the window add theirs.

Note: waiting inside backward. Memory for a few buckets means that a rank waits, from a hook, for the others to send
what it sent. Where a rank did not use a parameter it sends at the end of its backward; so a model whose own backward
communicates must use the same parameters on every rank, or each waits for the other.

Note: unused parameters. Ranks must agree on which parameters got a gradient in the window anywhere: the others keep
``grad`` None. One small collective per window sums a flag per parameter, behind the last bucket.

Note: sums that differ. At stage 2 a rank that forgets a window, by ``zero_grad()``, forgets its part of what all ranks
have summed. The same message has the number of backwards that each rank's shards are the sum of; where they differ,
every rank raises.

Note: sources of an overflow. The same message has, where it is asked for, one flag per rank and bucket: whether what
this rank sent was finite. Nobody reads them but a step that has overflowed.

Note: a model that was changed. A rank that finds its own model changed sends :data:`CHANGED` for one parameter's flag;
every rank raises when it reads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ds_core.errors import CheckpointError, EngineError
from ds_core.partition.ordered import OrderedBuckets, SlotBucket
from ds_core.partition.window import extremes, is_finite
from ds_zero.collectives import received_numel, reduce_scatter
from ds_zero.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from torch.distributed import ProcessGroup, Work

    from ds_core.interfaces.precision import ParameterDtypes
    from ds_core.partition.changes import Change
    from ds_zero.collectives import ReduceScatter
    from ds_zero.layout import Layout

__all__ = ["ShardBucket", "ShardedGradients"]

CHANGED = 2**16
"""More than any number of ranks."""
IN_FLIGHT = 2
"""Collectives under way at a time; each holds a bucket's memory."""


class ShardBucket(SlotBucket):
    """A bucket of which this rank keeps one segment."""

    def __init__(self, index: int, params: Sequence[nn.Parameter], dtypes: ParameterDtypes, layout: Layout) -> None:
        super().__init__(index, params)
        self.layout, self.dtypes = layout, dtypes
        self.device = params[0].device
        self.room: Tensor | None = None
        """Memory it was lent."""
        self.storage: Tensor | None = None
        """``[layout.total]`` of that: gradients of this rank, in the dtype they accumulate in."""
        self.shard: Tensor | None = None
        """``[layout.segment]``: this rank's segment of what was reduced in this window."""
        self._kept: Tensor | None = None
        """Memory of the shard that outlives the window."""
        self.message: Tensor | None = None
        """Memory lent for what is sent, where that is not the storage itself."""
        self.received: Tensor | None = None
        """Memory lent for what other ranks send."""

    def keep(self) -> Tensor:
        """Return memory for a shard, the same in each window, whatever is in it."""
        if self._kept is None:
            self._kept = torch.empty(self.layout.segment, dtype=self.dtypes.accumulate, device=self.device)
        return self._kept

    def open(self, room: Tensor) -> None:
        """Give it memory, whatever is in it."""
        self.room = room
        self.storage = storage = room[: self.layout.total]
        for low, high in self.layout.gaps():
            storage[low:high].zero_()
        places = zip(self.layout.offsets, self.layout.numels, self.params, strict=True)
        self.slots = tuple(storage[at : at + numel].view(param.shape) for at, numel, param in places)

    def close(self) -> Tensor:
        """Take its memory away; gradients in it are gone."""
        room = self.room
        assert room is not None
        self.hide()
        self.room, self.storage, self.slots = None, None, ()
        return room

    def drop(self) -> None:
        """Let all memory go."""
        if self.room is not None:
            self.close()
        self.shard = self._kept = None

    def hide(self) -> None:
        """Take the slots from the parameters."""
        for param in self.params:
            param.grad = None


class ShardedGradients(OrderedBuckets[ShardBucket]):
    """The gradients of one engine at stage 1 or 2."""

    def __init__(
        self,
        buckets: Sequence[ShardBucket],
        names: Mapping[nn.Parameter, str],
        dtypes: Mapping[nn.Parameter, ParameterDtypes],
        group: ProcessGroup,
        *,
        after: float,
        every_backward: bool,
        find_sources: bool,
    ) -> None:
        """Hook the parameters.

        Args:
            buckets: in the order in which they are expected to be full.
            names: for errors.
            dtypes: of each parameter, after the plan.
            group: the ranks that reduce.
            after: multiplied into what a collective returns, see ``ds_core.partition.division``.
            every_backward: send in each backward, not only in the one that ends a window.
            find_sources: remember which ranks had inf or NaN.
        """
        super().__init__(buckets, names, dtypes)
        self._group, self._every_backward, self._find_sources = group, every_backward, find_sources
        self._after = after
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self._at_boundary = False
        self._rooms, self._received, self._messages = Pool(), Pool(), Pool()
        """Memory of buckets; of what other ranks send; and of what is sent, where it is not the bucket itself."""
        self._first_flag = [0]
        for bucket in self.buckets:
            self._first_flag.append(self._first_flag[-1] + len(bucket.params))
        self._seen = bytearray(self._first_flag[-1])
        """1 for each parameter that had a gradient of this rank in this window."""
        self._used: list[int] | None = None
        """The same over all ranks, once the window was reduced."""
        device = self.buckets[0].device if self.buckets else torch.device("cpu")
        self._summed = 0
        """Backwards of this window that were reduced."""
        counts = self._world_size if every_backward else 0
        marks = self._world_size * len(self.buckets) if find_sources else 0
        numels = [self._first_flag[-1], counts, marks]
        self._message = torch.zeros(sum(numels), dtype=torch.int32, device=device)
        self._flags, self._counts, flat_marks = self._message.split(numels)
        self._marks = flat_marks.view(-1, self._world_size)
        self._message_work: Work | None = None
        self._sources_mixed = False

    def buffer_bytes(self) -> int:
        """Return how much memory collectives take at most, beside gradients: the rank's whole ones or its shards.

        In a backward that fills buckets in their order; one that begins several of them gives memory to each.
        """
        found = self._message.nbytes
        for kind in {(bucket.dtypes, bucket.device) for bucket in self.buckets}:
            alike = [bucket for bucket in self.buckets if (bucket.dtypes, bucket.device) == kind]
            dtypes, device = kind
            total = max(bucket.layout.total for bucket in alike)
            segment = max(bucket.layout.segment for bucket in alike)
            reduce = dtypes.reduce if self._world_size > 1 else dtypes.accumulate
            under_way = min(IN_FLIGHT, len(alike))
            found += under_way * received_numel(segment, self._group, device) * reduce.itemsize
            if reduce != dtypes.accumulate:
                found += under_way * total * reduce.itemsize
            if self._every_backward:
                found += min(IN_FLIGHT + 1, len(alike)) * total * dtypes.accumulate.itemsize
        return found

    # -- what is sent -----------------------------------------------------------------------------------------------

    def begin(self, *, reduce: bool, change: Change | None = None) -> None:
        self._at_boundary = reduce
        super().begin(reduce=reduce or self._every_backward, change=change)
        self._ends_window = reduce

    def end(self) -> None:
        super().end()
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.hide()

    def reopen(self) -> None:
        if self._used is None:
            return
        self._sources_mixed = True
        if not self._every_backward:
            # Full gradients again: what was reduced becomes this rank's own, of each element one rank has it.
            for bucket in self.buckets:
                self._put_back(bucket)
        self._used = None

    def _put_back(self, bucket: ShardBucket) -> None:
        storage = bucket.storage
        assert storage is not None
        first, last = self._mine(bucket)
        storage[:first].zero_()
        storage[last:].zero_()
        if self._after != 1.0:
            storage[first:last].mul_(1.0 / self._after)
        bucket.shard = None
        for place, param in enumerate(bucket.params):
            if self.is_used(bucket, place):
                param.grad = bucket.slots[place]

    def _mine(self, bucket: ShardBucket) -> tuple[int, int]:
        """Return where this rank's segment of a bucket begins and ends."""
        segment = bucket.layout.segment
        return self._rank * segment, (self._rank + 1) * segment

    def make_room(self, bucket: ShardBucket) -> None:
        bucket.open(self._rooms.take(bucket.layout.total, bucket.dtypes.accumulate, bucket.device))

    def before_send(self) -> None:
        if self._started >= IN_FLIGHT:
            self.take(self.buckets[self._started - IN_FLIGHT])

    def send(self, bucket: ShardBucket) -> ReduceScatter:
        if not bucket.slots:  # this rank used nothing of it
            self.make_room(bucket)
        unfilled = set(bucket.unfilled())
        for place in range(len(bucket.params)):
            self._seen[self._first_flag[bucket.index] + place] |= place not in unfilled
        for place in unfilled:
            bucket.slots[place].zero_()
        assert bucket.storage is not None
        total, message = bucket.layout.total, bucket.storage
        # On one rank nothing travels, so nothing loses digits for it.
        dtype = bucket.dtypes.reduce if self._world_size > 1 else message.dtype
        if message.dtype != dtype:
            bucket.message = self._messages.take(total, dtype, bucket.device)
            message = bucket.message[:total].copy_(bucket.storage)
        if self._find_sources:
            self._mark_source(bucket, message)
        numel = received_numel(bucket.layout.segment, self._group, bucket.device)
        bucket.received = self._received.take(numel, dtype, bucket.device)
        return reduce_scatter(message, bucket.received[:numel], self._group)

    def _mark_source(self, bucket: ShardBucket, message: Tensor) -> None:
        values = extremes(message)
        if values:
            self._marks[bucket.index, self._rank] |= torch.stack(values).isfinite().all().logical_not()

    def receive(self, bucket: ShardBucket, result: ReduceScatter) -> None:
        assert bucket.storage is not None
        again = bucket.shard is not None
        if self._every_backward:
            bucket.shard = bucket.keep()
        else:
            first, last = self._mine(bucket)
            bucket.shard = bucket.storage[first:last]
        if again and self._after != 1.0:
            # Where what was sent lay, so that the factor meets the new part alone.
            first, last = self._mine(bucket)
            result.sum_into(bucket.storage[first:last], add=False)
            bucket.shard.add_(bucket.storage[first:last], alpha=self._after)
        else:
            result.sum_into(bucket.shard, add=again)
            if self._after != 1.0:
                bucket.shard.mul_(self._after)
        assert bucket.received is not None
        self._received.give_back(bucket.received)
        if bucket.message is not None:
            self._messages.give_back(bucket.message)
        bucket.received = bucket.message = None
        if self._every_backward:
            self._rooms.give_back(bucket.close())
        else:
            bucket.hide()

    def after_last_send(self) -> None:
        self._summed += 1
        if not self._at_boundary:
            return
        flags = torch.tensor(list(self._seen), dtype=torch.int32)
        if self._change is not None:
            index, place = self.mark_of_change()
            flags[self._first_flag[index] + place] = CHANGED
        self._flags.copy_(flags, non_blocking=True)
        if self._every_backward:
            self._counts.zero_()
            self._counts[self._rank] = self._summed
        self._message_work = dist.all_reduce(self._message, group=self._group, async_op=True)

    def wait(self) -> None:
        super().wait()
        if self._message_work is not None:
            try:
                self._message_work.wait()
            except RuntimeError as error:
                raise self._lost(self.buckets[-1], error) from error
            self._message_work = None
            # On a GPU the host waits here, once.
            told = self._message[: len(self._flags) + len(self._counts)].tolist()
            self._used = used = told[: len(self._flags)]
            if max(used, default=0) >= CHANGED:
                at = next(place for place, flag in enumerate(used) if flag >= CHANGED)
                self.refuse_change([param for bucket in self.buckets for param in bucket.params][at])
            self._check_counts(told[len(self._flags) :])

    def _check_counts(self, counts: Sequence[int]) -> None:
        """Refuse a window of which some ranks have dropped more than others: their shards are of different sums."""
        if len(set(counts)) > 1:
            self._aborted, self.is_reduced = True, False
            listing = ", ".join(f"rank {rank} {count}" for rank, count in enumerate(counts))
            raise EngineError(
                f"the ranks hold sums of different backwards of this window: {listing}; one has called zero_grad(), "
                "perhaps after an error, where the others went on",
                where="backward",
                fix="call engine.zero_grad() on every rank to begin the window anew; in the midst of one, call it on "
                "all ranks or none",
            )

    # -- what was received ------------------------------------------------------------------------------------------

    def is_used(self, bucket: ShardBucket, place: int) -> bool:
        """Return whether any rank had a gradient of this parameter in the window that was reduced."""
        assert self._used is not None
        return self._used[self._first_flag[bucket.index] + place] > 0

    def flats(self) -> list[Tensor]:
        """Return this rank's shards: what it owns of every reduced gradient, and zeros. Valid after :meth:`wait`."""
        return [bucket.shard for bucket in self.buckets if bucket.shard is not None]

    def own(self, bucket: ShardBucket, place: int) -> Tensor:
        """Return the part of a reduced gradient that this rank owns, flat; empty if it owns nothing of it."""
        share = bucket.layout.share(place, self._rank)
        assert bucket.shard is not None
        return bucket.shard[share.at : share.at + share.length]

    def non_finite(self) -> tuple[nn.Parameter, tuple[int, ...] | None] | None:
        """As the base says; collective, because each rank has read only what it owns."""
        first = len(self._seen)
        for bucket in self.buckets:
            for place in range(len(bucket.params)):
                if self.is_used(bucket, place) and not is_finite(self.own(bucket, place)):
                    first = min(first, self._first_flag[bucket.index] + place)
        found = torch.tensor([first], device=self._message.device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self._group)
        if int(found) == len(self._seen):
            return None
        bucket, place = next(
            (bucket, int(found) - begin)
            for bucket, begin in zip(self.buckets, self._first_flag, strict=False)
            if int(found) < begin + len(bucket.params)
        )
        is_known = self._find_sources and not self._sources_mixed
        marked = self._marks[bucket.index].tolist() if is_known else []
        return bucket.params[place], tuple(rank for rank, mark in enumerate(marked) if mark) if is_known else None

    # -- the window -------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        super().clear()
        for bucket in self.buckets:
            bucket.shard = None
            if bucket.storage is not None:
                self._rooms.give_back(bucket.close())
        self._seen = bytearray(len(self._seen))
        self._used, self._sources_mixed, self._at_boundary, self._summed = None, False, False, 0
        self._message.zero_()

    def unfinished(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the gradients of a window that goes on: shards where it was reduced, else full ones of this rank.

        Collective where it was reduced. A shard is flat, and empty where this rank owns nothing of a parameter.
        """
        seen: list[int] = []
        if self._every_backward:
            self._finish()
            everywhere = torch.tensor(list(self._seen), dtype=torch.int32, device=self._message.device)
            dist.all_reduce(everywhere, group=self._group)
            seen = everywhere.tolist()
        for bucket in self.buckets:
            for place, param in enumerate(bucket.params):
                if self._every_backward:
                    if seen[self._first_flag[bucket.index] + place]:
                        yield param, self.own(bucket, place)
                elif param.grad is not None:
                    yield param, param.grad

    def restore(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """As the base says.

        Raises:
            CheckpointError: the window was divided in another way. Some rank at least raises it; nothing has changed.
        """
        self._check_division(gradients)
        self.clear()
        for bucket in self.buckets:
            held = [place for place, param in enumerate(bucket.params) if param in gradients]
            if not held:
                continue
            if self._every_backward:
                bucket.shard = bucket.keep().zero_()
            else:
                self.make_room(bucket)
            for place in held:
                param = bucket.params[place]
                if self._every_backward:
                    self.own(bucket, place).copy_(gradients[param])
                    self._seen[self._first_flag[bucket.index] + place] = 1
                else:
                    bucket.slots[place].copy_(gradients[param])
                    param.grad = bucket.slots[place]

    def _check_division(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        # Ranks own intervals in the order of ranks, so where all have as many elements, all have the same ones.
        for bucket in self.buckets:
            for place, param in enumerate(bucket.params):
                own = bucket.layout.share(place, self._rank).length if self._every_backward else param.numel()
                if param in gradients and gradients[param].numel() != own:
                    raise CheckpointError(
                        f"the checkpoint's unfinished gradients are divided in another way: this rank has "
                        f"{gradients[param].numel()} elements of a parameter there, {own} here",
                        where=f"load_checkpoint, parameter {self._names[param]!r}",
                        fix="load it with the reduce_bucket_size and the optimizer it was written with and save at a "
                        "step boundary, or pass load_optimizer_states=False",
                    )

    def detach(self) -> None:
        self._finish()
        for bucket in self.buckets:
            # The partition that knows the bucket may live on. What a collective still reads stays.
            if bucket.work is None:
                bucket.drop()
        super().detach()
        for pool in (self._rooms, self._received, self._messages):
            pool.clear()
