"""The gradients of one accumulation window: opened by a backward, closed by the step, and safe when autograd raises."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from ds_core.errors import EngineError, NotBuiltError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from ds_core.interfaces.precision import ParameterDtypes
    from ds_core.partition.changes import Change

__all__ = ["GradientWindow", "LocalGradients", "extremes", "is_finite", "sparse_gradient"]


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element of ``tensor`` is inf or NaN. Waits for the device."""
    return all(value.isfinite().item() for value in extremes(tensor))


def extremes(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the least and the greatest element, 0-d each; both NaN where one element is. Nothing if it is empty.

    They are finite if and only if every element is, and one read finds them. Unlike a sum they cannot overflow.
    """
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tuple(torch.aminmax(real)) if real.numel() else ()


def sparse_gradient(name: str) -> NotBuiltError:
    """Return the error for a gradient that is not dense."""
    return NotBuiltError(
        "a parameter received a sparse gradient, which is not built yet",
        where=f"parameter {name!r}",
        fix="use dense gradients, such as torch.nn.Embedding(..., sparse=False)",
    )


class GradientWindow(ABC):
    """What a partition asks of its gradients. The state here is that of one backward; subclasses add the storage.

    Note: hooks refer to it weakly. Python's collector does not see what a hook of a tensor refers to, so a window that
    its parameters' hooks kept alive would keep the parameters alive, for good: an engine that is dropped without
    ``destroy()`` would never be freed. A hook whose window is gone does nothing.
    """

    def __init__(self, names: Mapping[nn.Parameter, str]) -> None:
        """``names``: of the parameters, for errors."""
        self._names = names
        self._own_dtype: list[nn.Parameter] = []
        """Parameters whose gradient has another dtype than they have."""
        # Also where the window is dropped without detach(): the model's next optimizer expects gradients as they were.
        weakref.finalize(self, _give_back_dtypes, self._own_dtype).atexit = False
        self._in_backward = self._ends_window = False
        self._aborted = False
        self._change: Change | None = None
        """What this rank did to its model, until the window is cleared."""
        self.is_reduced = False
        """Whether the last backward ended a window, and nothing was cleared or added since."""
        self._handles: list[RemovableHandle] = []

    def check_in_backward(self, param: Tensor) -> None:
        """Called by the hook of every parameter.

        Raises:
            EngineError: the gradient did not come from this engine's ``backward``.
        """
        if not self._in_backward:
            name = next(known for other, known in self._names.items() if other is param)
            raise EngineError(
                "a gradient arrived outside this engine's backward(loss): loss.backward() called directly is not built "
                "yet, nor is a loss of one engine that reaches the parameters of another",
                where=f"parameter {name!r}",
                fix="call engine.backward(loss), or backward(loss) of an optimizer made by hand; for a model that only "
                "passes gradients on: requires_grad_(False)",
            )

    def check_whole(self) -> None:
        """Called before gradients are used or added to.

        Raises:
            EngineError: a backward of this window raised.
        """
        if self._aborted:
            raise EngineError(
                "the backward before this one raised, so the gradients of this window are incomplete",
                where="backward",
                fix="call engine.zero_grad() to drop them; the window goes on with the coming micro-batches",
            )

    def begin(self, *, reduce: bool, change: Change | None = None) -> None:
        """Expect the gradients of one backward.

        Args:
            reduce: it is the last one in the window.
            change: what this rank did to its model, which is raised. Where gradients are sent to other ranks, these are
                told, and raise as well.
        """
        self.check_whole()
        self._change = change
        self._in_backward = True
        self.is_reduced = False
        self._ends_window = reduce

    def end(self) -> None:
        """Autograd is done."""
        self._in_backward = False
        self.is_reduced = self._ends_window

    def abort(self) -> None:
        """Autograd raised. Collectives may be under way whose peers never come, so nothing is awaited."""
        self._in_backward = False
        self._aborted = True

    def allow_gradients_in(self, param: nn.Parameter, dtype: torch.dtype | None) -> None:
        """Let ``param.grad`` have a dtype of its own; None: whichever it is given."""
        param.grad_dtype = dtype
        self._own_dtype.append(param)

    @abstractmethod
    def non_finite(self) -> tuple[nn.Parameter, tuple[int, ...] | None] | None:
        """Return the first parameter in the order of backward whose reduced gradient has inf or NaN, and the ranks.

        The ranks are those that had it before the reduction, or None where that was not watched. None: all is finite.
        """

    @abstractmethod
    def wait(self) -> None:
        """Afterwards ``grad`` of each parameter is the reduced gradient, None where no rank used it."""

    @abstractmethod
    def flats(self) -> list[Tensor]:
        """Return tensors that hold every reduced gradient once, and zeros. Valid after :meth:`wait`.

        Raises:
            NotBuiltError: a gradient is sparse (where storage is flat, the hook raises it already).
        """

    @abstractmethod
    def clear(self) -> None:
        """Forget the window's gradients."""

    @abstractmethod
    def restore(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Continue a window with these gradients of this rank, copying them."""

    def detach(self) -> None:
        """Take the hooks off and let gradients go. Safe to repeat."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _give_back_dtypes(self._own_dtype)


def _give_back_dtypes(params: list[nn.Parameter]) -> None:
    for param in params:
        param.grad = None
        param.grad_dtype = param.dtype
    params.clear()


class LocalGradients(GradientWindow):
    """Gradients of the only rank, where autograd leaves them: nothing is copied, nothing reduced."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        names: Mapping[nn.Parameter, str],
        dtypes: Mapping[nn.Parameter, ParameterDtypes],
    ) -> None:
        """Hook ``params``, in the order of the model; ``names`` are for errors."""
        super().__init__(names)
        self._params = list(params)
        for param in params:
            if dtypes[param].accumulate != param.dtype:
                # Autograd itself adds in this dtype then.
                self.allow_gradients_in(param, dtypes[param].accumulate)
        hook = self._hook()
        self._handles = [param.register_post_accumulate_grad_hook(hook) for param in params]

    def _hook(self) -> Callable[[Tensor], None]:
        of_hook = weakref.ref(self)

        def gradient_is_ready(param: Tensor) -> None:
            window = of_hook()
            if window is not None and not window._in_backward:
                window.check_in_backward(param)

        return gradient_is_ready

    def begin(self, *, reduce: bool, change: Change | None = None) -> None:
        if change is not None:
            raise change.error()
        super().begin(reduce=reduce)

    def wait(self) -> None:
        """There is nobody to wait for."""

    def non_finite(self) -> tuple[nn.Parameter, tuple[int, ...]] | None:
        for param in reversed(self._params):
            if param.grad is not None and not is_finite(param.grad):
                return param, (0,)
        return None

    def flats(self) -> list[Tensor]:
        found = []
        for param in self._params:
            if param.grad is not None:
                if param.grad.layout is not torch.strided:
                    raise sparse_gradient(self._names[param])
                found.append(param.grad)
        return found

    def clear(self) -> None:
        self._aborted = self.is_reduced = False
        for param in self._params:
            param.grad = None

    def restore(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        self.clear()
        for param, gradient in gradients.items():
            param.grad = gradient.to(param.grad_dtype, copy=True)

    def detach(self) -> None:
        super().detach()
        self.clear()
        self._params.clear()
