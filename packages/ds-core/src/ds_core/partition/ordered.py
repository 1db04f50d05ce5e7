"""Gradients in flat buckets, each sent as soon as autograd has filled it, in the same order on every rank.

Each trainable parameter has a slot in one bucket; after its first gradient of an accumulation window ``param.grad`` is
a view of that slot, and further micro-batches add in place. In a backward that sends, a full bucket's collective is
started from the hook of its last parameter, while autograd goes on with the rest. What the collective is, and what
becomes of its result, subclasses decide.

Note: bucket order. Collectives must start in the same order on every rank, or ranks would sum unrelated buckets. So a
bucket starts only after all before it; what is left when autograd returns (unused parameters) starts in order then.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar

import torch

from ds_core import comm
from ds_core.errors import CommError, EngineError
from ds_core.partition.changes import changed_elsewhere
from ds_core.partition.window import GradientWindow, sparse_gradient

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from ds_core.interfaces.precision import ParameterDtypes
    from ds_core.partition.changes import Change

__all__ = ["OrderedBuckets", "SlotBucket"]


class _Awaited(Protocol):
    def wait(self) -> Any: ...


class SlotBucket:
    """Consecutive parameters of equal dtypes on one device, and the slots of their gradients."""

    def __init__(self, index: int, params: Sequence[nn.Parameter]) -> None:
        self.index = index
        self.params = tuple(params)
        self.slots: tuple[Tensor, ...] = ()
        """Where the gradient of each goes, in its shape; empty while there is no room for them."""
        self.arrived = bytearray(len(self.params))
        """1 for each parameter whose gradient this backward has delivered."""
        self.waiting_for = 0
        """How many have not."""
        self.work: _Awaited | None = None
        """The collective that is under way."""

    def unfilled(self) -> list[int]:
        """Return the places of the parameters without a gradient in their slot, on this rank."""
        return [
            i for i, (param, slot) in enumerate(zip(self.params, self.slots, strict=True)) if param.grad is not slot
        ]


BucketT = TypeVar("BucketT", bound=SlotBucket)


class OrderedBuckets(GradientWindow, Generic[BucketT]):
    """The buckets of one engine, the hooks that fill them, and the order in which they are sent."""

    def __init__(
        self,
        buckets: Sequence[BucketT],
        names: Mapping[nn.Parameter, str],
        dtypes: Mapping[nn.Parameter, ParameterDtypes],
    ) -> None:
        """Hook the parameters of ``buckets``, which are in the order in which they are expected to be full."""
        super().__init__(names)
        self.buckets = list(buckets)
        for bucket in self.buckets:
            for param in bucket.params:
                if dtypes[param].accumulate != param.dtype:
                    # Fresh ones come in the parameter's dtype, the slot has the one they accumulate in.
                    self.allow_gradients_in(param, None)
        self._sending = False
        """Whether this backward sends."""
        self._started = 0
        """Buckets sent since the gradients were last only this rank's own."""
        self._out_of_step = False
        """A collective was given up on: the next one here would meet another one of the other ranks."""
        self._handles = [
            param.register_post_accumulate_grad_hook(self._hook(bucket.index, place))
            for bucket in self.buckets
            for place, param in enumerate(bucket.params)
        ]

    @abstractmethod
    def send(self, bucket: BucketT) -> _Awaited:
        """Start the collective on the gradients of ``bucket``; slots of parameters without one are not written yet."""

    @abstractmethod
    def receive(self, bucket: BucketT, result: Any) -> None:
        """Take what ``wait()`` of the collective returned. Called in the order of the buckets."""

    @abstractmethod
    def reopen(self) -> None:
        """The window was reduced already, and another backward adds to it."""

    def make_room(self, bucket: BucketT) -> None:
        """Called before a gradient goes into ``bucket`` that has no slots."""

    def before_send(self) -> None:
        """Called before each :meth:`send`; may :meth:`take` what was sent before."""

    def after_last_send(self) -> None:
        """Called when every bucket was sent."""

    def _hook(self, index: int, place: int) -> Callable[[Tensor], None]:
        of_hook = weakref.ref(self)

        def gradient_is_ready(param: Tensor) -> None:
            window = of_hook()
            if window is not None:
                window._gradient_is_ready(window.buckets[index], place, param)

        return gradient_is_ready

    def _gradient_is_ready(self, bucket: BucketT, place: int, param: Tensor) -> None:
        if not self._in_backward:
            self.check_in_backward(param)
        if self._sending and bucket.index < self._started:
            # Its slot is in a collective's hands by now; adding to it would corrupt the sum without a word.
            raise EngineError(
                "a parameter received a second gradient in one backward, after its bucket was sent",
                where=f"parameter {self._names[bucket.params[place]]!r}",
                fix="reentrant activation checkpointing does this to shared parameters: use use_reentrant=False",
            )
        if not bucket.slots:
            self.make_room(bucket)
        slot = bucket.slots[place]
        if param.grad is not slot:
            # The first gradient of the window. Copying it here and letting it go costs less than having autograd
            # add it to a slot that was zeroed before.
            assert param.grad is not None
            if param.grad.layout is not torch.strided:
                raise sparse_gradient(self._names[bucket.params[place]])
            try:
                slot.copy_(param.grad)
                param.grad = slot
            except RuntimeError as error:
                raise self._misfit(param, slot, error) from error
        if bucket.arrived[place]:
            return
        bucket.arrived[place] = 1
        bucket.waiting_for -= 1
        if bucket.waiting_for == 0 and self._sending:
            self._send_full_buckets()

    def _misfit(self, param: Tensor, slot: Tensor, error: RuntimeError) -> RuntimeError:
        fits = param.shape == slot.shape and param.device == slot.device
        if fits and (param.grad_dtype is None or param.dtype == slot.dtype):
            return error
        found, was = (f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}" for tensor in (param, slot))
        return EngineError(
            f"a parameter is {found}, and its gradients are expected to be {was} since initialize",
            where=f"parameter {next(name for known, name in self._names.items() if known is param)!r}",
            fix="move or cast the model before initialize",
        )

    def begin(self, *, reduce: bool, change: Change | None = None) -> None:
        super().begin(reduce=reduce, change=change)
        if self._started:
            self.wait()
            self._started = 0
            self.reopen()
        for bucket in self.buckets:
            bucket.arrived = bytearray(len(bucket.params))
            bucket.waiting_for = len(bucket.params)
        self._sending = reduce
        if change is not None:
            # Nothing is computed with a model that is no longer that of the other ranks, but what they wait for is
            # sent: so they are told, and stay in step.
            super().end()
            self.wait()
            self.refuse_change(change.param)

    def end(self) -> None:
        super().end()
        if self._sending and self._ends_window:
            # Waiting here, not in the step, costs nothing: there is no backward left to overlap with, and the caller
            # may read gradients between the two. On a GPU only the stream waits.
            self.wait()
        elif self._sending:
            # Nobody reads these before the next backward: they travel during its forward.
            self._send_rest()

    def abort(self) -> None:
        super().abort()
        if any(bucket.work is not None for bucket in self.buckets):
            self._give_up()

    def mark_of_change(self) -> tuple[int, int]:
        """Return the bucket and the place in it by which this rank tells of its :attr:`_change`."""
        assert self._change is not None
        places = [(bucket.index, at, param) for bucket in self.buckets for at, param in enumerate(bucket.params)]
        own = [(index, at) for index, at, param in places if param is self._change.param]
        return next(iter(own + [(index, at) for index, at, param in places if param.numel()]), (0, 0))

    def refuse_change(self, told: nn.Parameter) -> NoReturn:
        """Raise on every rank what one of them has told all by the mark of ``told``. The collectives are done."""
        self._aborted, self.is_reduced = True, False
        raise changed_elsewhere(self._names[told]) if self._change is None else self._change.error()

    def _give_up(self) -> None:
        self._aborted = self._out_of_step = True
        comm.leave_collectives_alone()

    def _send_full_buckets(self) -> None:
        while self._started < len(self.buckets) and self.buckets[self._started].waiting_for == 0:
            self._send_next()

    def _send_next(self) -> None:
        self.before_send()
        bucket = self.buckets[self._started]
        try:
            bucket.work = self.send(bucket)
        except RuntimeError as error:
            raise self._lost(bucket, error) from error
        self._started += 1
        if self._started == len(self.buckets):
            self.after_last_send()

    def take(self, bucket: BucketT) -> None:
        """Wait for what was sent of ``bucket``, and receive it."""
        if bucket.work is None:
            return
        try:
            result = bucket.work.wait()
        except RuntimeError as error:
            raise self._lost(bucket, error) from error
        bucket.work = None
        self.receive(bucket, result)

    def _send_rest(self) -> None:
        while self._started < len(self.buckets):
            self._send_next()

    def wait(self) -> None:
        self._send_rest()
        for bucket in self.buckets:
            self.take(bucket)

    def _lost(self, bucket: BucketT, error: RuntimeError) -> CommError:
        self._give_up()
        first, last = self._names[bucket.params[0]], self._names[bucket.params[-1]]
        return CommError(
            f"the gradients could not be summed over the ranks: {str(error).splitlines()[0]}",
            where=f"bucket {bucket.index} of {len(self.buckets)}, parameters {first!r} to {last!r}",
            fix="another rank has ended or does something else; its own error, printed by the launcher, says why",
        )

    def _finish(self) -> None:
        """Wait for what was sent, if anything was."""
        if self._started and not self._aborted:
            self.wait()

    def clear(self) -> None:
        if self._out_of_step:
            raise EngineError(
                "a gradient collective was under way when this rank gave up, so the ranks are no longer in step",
                where="zero_grad",
                fix="end this process and start the job again from its last checkpoint",
            )
        self._finish()
        self._aborted = self.is_reduced = False
        self._change = None
        self._started = 0
        for bucket in self.buckets:
            for param in bucket.params:
                param.grad = None

    def detach(self) -> None:
        super().detach()
        for bucket in self.buckets:
            for param in bucket.params:
                param.grad = None
        self.buckets.clear()
