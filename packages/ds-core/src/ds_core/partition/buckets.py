"""Flat gradient buckets that start their collective as soon as autograd has filled them.

Each trainable parameter has a slot in one bucket; after its first gradient of an accumulation window ``param.grad`` is
a view of that slot, and further micro-batches add in place. In a backward that reduces, a full bucket's collective is
started from the hook of its last parameter, while autograd goes on with the rest. What the collective is, the owner of
the buckets decides.

Note: bucket order. Collectives must start in the same order on every rank, or ranks would sum unrelated buckets. So a
bucket starts only after all before it; what is left when autograd returns (unused parameters) starts in order then.

Note: dtypes. A bucket holds gradients in the dtype they accumulate in. Where they are reduced in another one, the
bucket is cast into a message for the collective, and the message cast back.

Note: unused parameters. Behind the gradients a bucket has one flag per parameter: 1 where this rank has a gradient,
0 where it has none and its slot is zero. The flags are summed by the same collective. A rank that used all of a
bucket's parameters never looks; one that did not learns from the flag whether another rank did. A parameter that no
rank used keeps ``grad`` None, so that the optimizer leaves it alone as plain PyTorch would.

Note: sources of an overflow. Once summed, an inf of one rank is everybody's. Where it is asked for, each rank writes
before the collective whether its own part of the bucket is finite into the place that it alone has behind the flags.
Nobody reads these places but a step that has overflowed.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from ds_core import comm
from ds_core.errors import CommError, EngineError
from ds_core.partition.arithmetic import plan_buckets
from ds_core.partition.window import GradientWindow, extremes, is_finite, sparse_gradient

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn
    from torch.distributed import Work

    from ds_core.interfaces.precision import ParameterDtypes

    StartCollective = Callable[["Bucket"], Work]

__all__ = ["Bucket", "Bucketer"]


class Bucket:
    """Consecutive parameters of equal dtypes on one device, their gradients in one flat tensor."""

    def __init__(self, index: int, params: Sequence[nn.Parameter], dtypes: ParameterDtypes, sources: int) -> None:
        """``sources``: ranks that say whether their part was finite; 0: none does."""
        self.index = index
        self.params = tuple(params)
        self.numel = sum(param.numel() for param in params)
        self.arrived = bytearray(len(self.params))
        """1 for each parameter whose gradient this backward has delivered."""
        self.waiting_for = 0
        """How many have not."""
        self.work: Work | None = None
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

    def unseal(self) -> None:
        """Take the reduced message back."""
        if self.message is not self.storage:
            self.storage.copy_(self.message)
            self.message = self.storage

    def mark_source(self, rank: int) -> None:
        """Write into the sealed message whether what ``rank``, this one, sends is finite: the cast may have been it."""
        gradients, _, sources = self.message.split([self.numel, len(self.flags), len(self.sources)])
        sources.zero_()
        values = extremes(gradients)
        if values:
            sources[rank] = torch.stack(values).isfinite().all().logical_not()

    def unfilled(self) -> list[int]:
        """Return the places of the parameters without a gradient in this window, on this rank."""
        return [
            i for i, (param, slot) in enumerate(zip(self.params, self.slots, strict=True)) if param.grad is not slot
        ]


class Bucketer(GradientWindow):
    """The buckets of one engine, and the hooks that fill them."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        names: Mapping[nn.Parameter, str],
        dtypes: Mapping[nn.Parameter, ParameterDtypes],
        *,
        bucket_bytes: int,
        rank: int,
        world_size: int,
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
            find_sources: remember which ranks had inf or NaN.
            start: starts the collective that sums ``bucket.message`` over the ranks, and returns its handle.
        """
        super().__init__(names)
        ordered = list(reversed(params))
        plan = plan_buckets(
            [param.numel() * dtypes[param].reduce.itemsize for param in ordered],
            [(dtypes[param].accumulate, dtypes[param].reduce, param.device) for param in ordered],
            bucket_bytes,
            max(1, bucket_bytes // 25),
        )
        sources = world_size if find_sources else 0
        self.buckets = [
            Bucket(index, [ordered[i] for i in items], dtypes[ordered[items[0]]], sources)
            for index, items in enumerate(plan)
        ]
        for bucket in self.buckets:
            for param in bucket.params:
                if bucket.storage.dtype != param.dtype:
                    self.allow_gradients_in(
                        param, None
                    )  # fresh ones come in the parameter's, the slot has the bucket's
        self._rank, self._world_size = rank, world_size
        self._sources_mixed = False
        """A window that was reduced twice: the second time every rank sends what the first one summed."""
        self._start = start
        self._reducing = False
        self._out_of_step = False
        """A collective was given up on: the next one here would meet another one of the other ranks."""
        self._started = 0
        """Buckets whose collective was started since the gradients were last only this rank's own."""
        self._handles = [
            param.register_post_accumulate_grad_hook(self._hook(bucket.index, place))
            for bucket in self.buckets
            for place, param in enumerate(bucket.params)
        ]

    def _hook(self, index: int, place: int) -> Callable[[Tensor], None]:
        of_hook = weakref.ref(self)

        def gradient_is_ready(param: Tensor) -> None:
            window = of_hook()
            if window is not None:
                window._gradient_is_ready(window.buckets[index], place, param)

        return gradient_is_ready

    def _gradient_is_ready(self, bucket: Bucket, place: int, param: Tensor) -> None:
        if not self._in_backward:
            self.check_in_backward(param)
        if bucket.work is not None:
            # Its slot is in a collective's hands by now; adding to it would corrupt the sum without a word.
            raise EngineError(
                "a parameter received a second gradient in one backward, after its bucket was sent",
                where=f"parameter {self._names[bucket.params[place]]!r}",
                fix="reentrant activation checkpointing does this to shared parameters: use use_reentrant=False",
            )
        slot = bucket.slots[place]
        if param.grad is not slot:
            # The first gradient of the window. Copying it here and letting it go costs less than having autograd
            # add it to a slot that was zeroed before.
            assert param.grad is not None
            if param.grad.layout is not torch.strided:
                raise sparse_gradient(self._names[bucket.params[place]])
            slot.copy_(param.grad)
            param.grad = slot
        if bucket.arrived[place]:
            return
        bucket.arrived[place] = 1
        bucket.waiting_for -= 1
        if bucket.waiting_for == 0 and self._reducing:
            self._start_full_buckets()

    def begin(self, *, reduce: bool) -> None:
        super().begin(reduce=reduce)
        if self._started:
            self._reopen()
        for bucket in self.buckets:
            bucket.arrived = bytearray(len(bucket.params))
            bucket.waiting_for = len(bucket.params)
        self._reducing = reduce

    def _reopen(self) -> None:
        # The window was reduced already and another backward adds to it. Every rank now has the same sum; a share of
        # 1 / world_size each makes the coming collective count it once.
        self.wait()
        for bucket in self.buckets:
            bucket.gradients.mul_(1.0 / self._world_size)
        self._started = 0
        self._sources_mixed = True

    def end(self) -> None:
        super().end()
        if self._reducing:
            # Waiting here, not in the step, costs nothing: there is no backward left to overlap with, and the caller
            # may read gradients between the two. On a GPU only the stream waits.
            self.wait()

    def abort(self) -> None:
        super().abort()
        if any(bucket.work is not None for bucket in self.buckets):
            self._give_up()

    def _give_up(self) -> None:
        self._aborted = self._out_of_step = True
        comm.leave_collectives_alone()

    def _start_full_buckets(self) -> None:
        while self._started < len(self.buckets) and self.buckets[self._started].waiting_for == 0:
            self._start_next()

    def _start_rest(self) -> None:
        while self._started < len(self.buckets):
            self._start_next()

    def _start_next(self) -> None:
        bucket = self.buckets[self._started]
        bucket.flags.fill_(1)
        for place in bucket.unfilled():
            bucket.slots[place].zero_()
            bucket.flags[place].zero_()
        bucket.seal()
        if len(bucket.sources):
            bucket.mark_source(self._rank)
        try:
            bucket.work = self._start(bucket)
        except RuntimeError as error:
            raise self._lost(bucket, error) from error
        self._started += 1

    def wait(self) -> None:
        self._start_rest()
        for bucket in self.buckets:
            if bucket.work is None:
                continue
            try:
                bucket.work.wait()
            except RuntimeError as error:
                raise self._lost(bucket, error) from error
            bucket.work = None
            bucket.unseal()
            self._deliver(bucket)

    def _deliver(self, bucket: Bucket) -> None:
        missing = bucket.unfilled()
        if not missing:
            return
        used = bucket.flags.tolist()
        for place in missing:
            bucket.params[place].grad = bucket.slots[place] if used[place] else None

    def non_finite(self) -> tuple[nn.Parameter, tuple[int, ...] | None] | None:
        for bucket in self.buckets:
            for param, slot in zip(bucket.params, bucket.slots, strict=True):
                if param.grad is not None and not is_finite(slot):
                    marked = [rank for rank, mark in enumerate(bucket.sources.tolist()) if mark]
                    is_known = len(bucket.sources) > 0 and not self._sources_mixed
                    return param, tuple(marked) if is_known else None
        return None

    def _lost(self, bucket: Bucket, error: RuntimeError) -> CommError:
        self._give_up()
        first, last = self._names[bucket.params[0]], self._names[bucket.params[-1]]
        return CommError(
            f"the gradients could not be summed over the ranks: {str(error).splitlines()[0]}",
            where=f"bucket {bucket.index} of {len(self.buckets)}, parameters {first!r} to {last!r}",
            fix="another rank has ended or does something else; its own error, printed by the launcher, says why",
        )

    def clear(self) -> None:
        if self._out_of_step:
            raise EngineError(
                "a gradient collective was under way when this rank gave up, so the ranks are no longer in step",
                where="zero_grad",
                fix="end this process and start the job again from its last checkpoint",
            )
        if self._started and not self._aborted:
            self.wait()
        self._aborted = self._sources_mixed = False
        self._started = 0
        for bucket in self.buckets:
            for param in bucket.params:
                param.grad = None

    def restore(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        self.clear()
        for bucket in self.buckets:
            for param, slot in zip(bucket.params, bucket.slots, strict=True):
                if param in gradients:
                    slot.copy_(gradients[param])
                    param.grad = slot

    def flats(self) -> list[Tensor]:
        return [bucket.gradients for bucket in self.buckets]

    def detach(self) -> None:
        super().detach()
        for bucket in self.buckets:
            for param in bucket.params:
                param.grad = None
        self.buckets.clear()
