"""Flat gradient buckets that are summed over the ranks, each rank keeping all of the sum; see ``ordered``.

Note: dtypes. A bucket holds gradients in the dtype they accumulate in. Where they are reduced in another one, the
bucket is cast into a message for the collective, and the message cast back.

Note: unused parameters. Behind the gradients a bucket has one flag per parameter: 1 where this rank has a gradient,
0 where it has none and its slot is zero. The flags are summed by the same collective. A rank that used all of a
bucket's parameters never looks; one that did not learns from the flag whether another rank did. A parameter that no
rank used keeps ``grad`` None, so that the optimizer leaves it alone as plain PyTorch would.

Note: a model that was changed. A rank that finds its own model changed sends NaN for one parameter, and NaN as its
flag. So no rank can take the step: each finds the norm not finite, looks for the source, and finds the flag.

Note: sources of an overflow. Once summed, an inf of one rank is everybody's. Where it is asked for, each rank writes
before the collective whether its own part of the bucket is finite into the place that it alone has behind the flags.
Nobody reads these places but a step that has overflowed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ds_core.partition.arithmetic import plan_buckets
from ds_core.partition.ordered import OrderedBuckets, SlotBucket
from ds_core.partition.window import extremes, is_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn
    from torch.distributed import Work

    from ds_core.interfaces.precision import ParameterDtypes

    StartCollective = Callable[["Bucket"], Work]

__all__ = ["Bucket", "Bucketer"]


class Bucket(SlotBucket):
    """A bucket whose gradients are one flat tensor, with flags behind them."""

    def __init__(self, index: int, params: Sequence[nn.Parameter], dtypes: ParameterDtypes, sources: int) -> None:
        """``sources``: ranks that say whether their part was finite; 0: none does."""
        super().__init__(index, params)
        self.numel = sum(param.numel() for param in params)
        numels = [self.numel, len(self.params), sources]
        self.storage = torch.zeros(sum(numels), dtype=dtypes.accumulate, device=self.params[0].device)
        """``[numel + len(params) + sources]``: gradients, flags, sources."""
        self.gradients, self.flags, self.sources = self.storage.split(numels)
        slots = self.gradients.split([param.numel() for param in self.params])
        self.slots = tuple(slot.view(param.shape) for slot, param in zip(slots, self.params, strict=True))
        self._reduce_dtype = dtypes.reduce
        self.message = self.storage
        """What the collective moves: the storage, or while one is under way its copy in the reduce dtype."""

    @property
    def message_bytes(self) -> int:
        return self.storage.numel() * self._reduce_dtype.itemsize

    def seal(self) -> None:
        """Make the message ready to be sent."""
        self.message = self.storage.to(self._reduce_dtype)

    def unseal(self, after: float) -> None:
        """Take the reduced message back, and multiply ``after`` into its gradients."""
        if self.message is not self.storage:
            self.storage.copy_(self.message)
            self.message = self.storage
        if after != 1.0:
            self.gradients.mul_(after)

    def mark_source(self, rank: int) -> None:
        """Write into the sealed message whether what ``rank``, this one, sends is finite: the cast may have been it."""
        gradients, _, sources = self.message.split([self.numel, len(self.flags), len(self.sources)])
        sources.zero_()
        values = extremes(gradients)
        if values:
            sources[rank] = torch.stack(values).isfinite().all().logical_not()


class Bucketer(OrderedBuckets[Bucket]):
    """The buckets of one engine whose ranks all keep whole gradients."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        names: Mapping[nn.Parameter, str],
        dtypes: Mapping[nn.Parameter, ParameterDtypes],
        *,
        bucket_bytes: int,
        rank: int,
        world_size: int,
        after: float,
        find_sources: bool,
        start: StartCollective,
    ) -> None:
        """Allocate the buckets and hook the parameters.

        Args:
            params: trainable parameters, in the order of the model; gradients are expected in reverse.
            names: for errors.
            dtypes: of each, after the plan; a bucket's are equal.
            bucket_bytes: close a bucket when its message has this size; the first one at a 25th, to start early.
            rank: this rank's place among those that reduce.
            world_size: ranks whose gradients a collective sums.
            after: multiplied into what a collective returns, see ``division``.
            find_sources: remember which ranks had inf or NaN.
            start: starts the collective that sums ``bucket.message`` over the ranks, and returns its handle.
        """
        ordered = list(reversed(params))
        plan = plan_buckets(
            [param.numel() * dtypes[param].reduce.itemsize for param in ordered],
            [(dtypes[param].accumulate, dtypes[param].reduce, param.device) for param in ordered],
            bucket_bytes,
            max(1, bucket_bytes // 25),
        )
        sources = world_size if find_sources else 0
        buckets = [
            Bucket(index, [ordered[i] for i in items], dtypes[ordered[items[0]]], sources)
            for index, items in enumerate(plan)
        ]
        super().__init__(buckets, names, dtypes)
        self._rank, self._world_size, self._after = rank, world_size, after
        self._sources_mixed = False
        """A window that was reduced twice: the second time every rank sends what the first one summed."""
        self._start = start

    def reopen(self) -> None:
        # Every rank now has the same sum; a share of 1 / world_size each makes the coming collective count it once.
        for bucket in self.buckets:
            bucket.gradients.mul_(1.0 / (self._world_size * self._after))
        self._sources_mixed = True

    def send(self, bucket: Bucket) -> Work:
        bucket.flags.fill_(1)
        for place in bucket.unfilled():
            bucket.slots[place].zero_()
            bucket.flags[place].zero_()
        if self._change is not None and self.mark_of_change()[0] == bucket.index:
            place = self.mark_of_change()[1]
            bucket.slots[place].fill_(math.nan)
            bucket.flags[place] = math.nan
        bucket.seal()
        if len(bucket.sources):
            bucket.mark_source(self._rank)
        return self._start(bucket)

    def receive(self, bucket: Bucket, result: Any) -> None:
        bucket.unseal(self._after)
        missing = bucket.unfilled()
        if not missing or self._change is not None:
            return
        used = bucket.flags.tolist()
        for place in missing:
            bucket.params[place].grad = bucket.slots[place] if used[place] else None

    def non_finite(self) -> tuple[nn.Parameter, tuple[int, ...] | None] | None:
        for bucket in self.buckets:
            for place, is_marked in enumerate(bucket.flags.isnan().tolist()):
                if is_marked:
                    self.refuse_change(bucket.params[place])
        for bucket in self.buckets:
            for param, slot in zip(bucket.params, bucket.slots, strict=True):
                if param.grad is not None and not is_finite(slot):
                    marked = [rank for rank, mark in enumerate(bucket.sources.tolist()) if mark]
                    is_known = len(bucket.sources) > 0 and not self._sources_mixed
                    return param, tuple(marked) if is_known else None
        return None

    def clear(self) -> None:
        super().clear()
        self._sources_mixed = False

    def restore(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        self.clear()
        for bucket in self.buckets:
            for param, slot in zip(bucket.params, bucket.slots, strict=True):
                if param in gradients:
                    slot.copy_(gradients[param])
                    param.grad = slot

    def flats(self) -> list[Tensor]:
        return [bucket.gradients for bucket in self.buckets]
