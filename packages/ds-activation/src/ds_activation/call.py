"""One checkpointed call, by ``torch.utils.checkpoint`` without reentrant autograd.

Note: two runs. torch is given a function and the tensors among its arguments, one by one. In the first run that
function takes the caller's arguments, containers and all, as they are. In the recomputation it builds them again from
the tensors that torch kept and those that :class:`~ds_activation.kept.Kept` has. In place of the latter torch keeps an
empty tensor of their device, by which it knows whose random state to keep.

Note: contexts. What a recomputation needs is brought back in the context around it, before that of the caller: a
selective one counts the operations of the function, and would count ours. torch enters one context object again for
each backward, so its parts are made anew each time (:class:`_Anew`).

Note: names. torch says that a recomputation differed, not of what. What it raises passes through the hook by which
backward asks for a saved tensor, and torch's own is on top when the first run begins: around it goes one that knows the
name.
"""

from __future__ import annotations

import functools
import time
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointError as TorchCheckpointError
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ds_activation import settings as settings_module
from ds_activation.rng import get_cuda_rng_tracker, replay
from ds_core.accelerator import get_accelerator
from ds_core.checkpointing import deepspeed_shape
from ds_core.errors import EngineError
from ds_core.log import log_dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    from torch.utils._pytree import TreeSpec

    from ds_activation.kept import Kept
    from ds_activation.settings import Settings

    Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

__all__ = ["RecomputationError", "checkpoint", "non_reentrant_checkpoint", "run", "shaped_checkpoint"]

_is_inside: ContextVar[bool] = ContextVar("ds_activation_inside", default=False)
"""Whether a checkpointed function runs: its first run, or its recomputation."""


class RecomputationError(EngineError, TorchCheckpointError):
    """What was computed again in backward is not what the forward computed."""


def checkpoint(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Return what ``function(*args, **kwargs)`` returns, by :func:`run` with the settings in force."""
    if torch.compiler.is_compiling():
        return _as_torch_does(function, args, kwargs, None)
    return run(function, args, kwargs, settings_module.current())


def shaped_checkpoint(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Do as :func:`checkpoint`; a list becomes a tuple, and one of a single element that element."""
    return deepspeed_shape(checkpoint(function, *args, **kwargs))


def non_reentrant_checkpoint(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Do as :func:`shaped_checkpoint`: no call is reentrant."""
    return shaped_checkpoint(function, *args, **kwargs)


def run(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    settings: Settings,
    *,
    context_fn: Contexts | None = None,
    name: str | None = None,
) -> Any:
    """Return what ``function(*args, **kwargs)`` returns; what backward needs of its inside is computed again there.

    Outputs and gradients are those of a plain call, random layers and autocast included. The caller's tensors are left
    as they are. In a call within a call, and in a region that torch compiles, inputs are kept by reference.

    Args:
        function: runs a second time in backward, up to where backward has all it needs.
        args: its arguments; tensors in lists, tuples and dicts among them are kept as those outside are.
        kwargs: by name, all of them the function's own.
        settings: what happens to the inputs, and what is logged.
        context_fn: as ``torch.utils.checkpoint.checkpoint`` takes it: returns the contexts of the two runs.
        name: what errors and the log call the function; None: its own.

    Raises:
        RecomputationError: in backward: the second run differed from the first. Also torch's ``CheckpointError``.
    """
    if torch.compiler.is_compiling():
        return _as_torch_does(function, args, kwargs, context_fn)
    is_watched = settings.synchronize_checkpoint_boundary or settings.profile
    if not torch.is_grad_enabled():
        with _watched(settings, "forward", name or _name(function)):
            return function(*args, **kwargs)
    keeping = None if _is_inside.get() else settings.keeping()
    leaves, spec = tree_flatten((args, dict(kwargs)))
    call = _Call(function, name or _name(function), args, kwargs, spec)
    if keeping is not None:
        leaves = call.keep(leaves, keeping.keep)
    options: dict[str, Any] = {}
    states = get_cuda_rng_tracker().get_states()
    # Without a need of its own contexts the call is torch's: its debug mode, for one, allows none.
    if is_watched or states or call.has_kept or context_fn is not None:
        options["context_fn"] = functools.partial(_contexts, call, settings, states, context_fn)
    result = torch_checkpoint(call, *leaves, *_anchor(leaves), use_reentrant=False, **options)
    return call.outcome(result)


def _as_torch_does(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], context_fn: Contexts | None
) -> Any:
    positional, names = len(args), tuple(kwargs)

    # By position, because torch keeps some keywords for itself.
    def by_position(*values: Any) -> Any:
        return function(*values[:positional], **dict(zip(names, values[positional:], strict=True)))

    given = by_position if kwargs else function
    if context_fn is None:
        return torch_checkpoint(given, *args, *kwargs.values(), use_reentrant=False)
    return torch_checkpoint(given, *args, *kwargs.values(), use_reentrant=False, context_fn=context_fn)


class _Call:
    """The function that torch runs twice; lives until backward has let go of its graph."""

    def __init__(
        self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], spec: TreeSpec
    ) -> None:
        self._function = function
        self.name = name
        self._first: tuple[tuple[Any, ...], Mapping[str, Any]] | None = (args, kwargs)
        self._spec = spec
        self._kept: dict[int, Kept] = {}
        """By place among the tensors."""
        self._restored: dict[int, Tensor] = {}
        self._error: BaseException | None = None

    @property
    def has_kept(self) -> bool:
        return bool(self._kept)

    def keep(self, leaves: list[Any], keep: Callable[[Tensor, int, str], Kept | None]) -> list[Any]:
        """Return ``leaves`` with empty tensors in place of those that are kept here."""
        given = list(leaves)
        seen: dict[int, Kept | None] = {}
        for at, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            if id(leaf) not in seen:
                seen[id(leaf)] = keep(leaf, at, self.name)
            kept = seen[id(leaf)]
            if kept is not None:
                self._kept[at] = kept
                given[at] = leaf.new_empty(0)
        return given

    def restore(self) -> None:
        """Bring back what is kept here, for the recomputation that follows."""
        restored = {id(kept): kept.restore() for kept in dict.fromkeys(self._kept.values())}
        self._restored = {at: restored[id(kept)] for at, kept in self._kept.items()}

    def __call__(self, *given: Any) -> Any:
        if self._first is not None:
            args, kwargs = self._first
            self._first = None
            try:
                with _naming(self.name):
                    return self._run(args, kwargs)
            except BaseException as error:
                # Raised by outcome: before 2.13 torch leaves its hooks in place where a function raises.
                self._error = error
                return None
        restored, self._restored = self._restored, {}
        leaves = [restored.get(at, leaf) for at, leaf in enumerate(given[: self._spec.num_leaves])]
        del restored, given
        args, kwargs = tree_unflatten(leaves, self._spec)
        del leaves
        return self._run(args, kwargs)

    def outcome(self, result: Any) -> Any:
        """Return the ``result`` of the first run, or raise what it raised."""
        error, self._error = self._error, None
        if error is None:
            return result
        try:
            raise error
        finally:
            del error  # its traceback holds this frame

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        token = _is_inside.set(True)
        try:
            return self._function(*args, **kwargs)
        finally:
            _is_inside.reset(token)


def _naming(name: str) -> AbstractContextManager[Any]:
    """Return the hooks on top, torch's for a checkpointed function, so that errors of a recomputation say whose."""
    pack, unpack = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def named(held: Any) -> Any:
        try:
            return unpack(held)
        except RecomputationError:
            raise  # of a call within this one
        except TorchCheckpointError as error:
            raise RecomputationError(
                f"{name}, computed again in backward, is not what it was in the forward: "
                + str(error).partition("\nTip:")[0].strip(),
                where="activation checkpointing",
                fix="let it do the same in both runs (nothing may depend on a counter, a cache, or random numbers of "
                "Python or NumPy), and read ctx.saved_tensors once in each backward of your own; "
                "torch.utils.checkpoint.set_checkpoint_debug_enabled(True) shows both runs, op by op",
            ) from error

    return torch.autograd.graph.saved_tensors_hooks(pack, named)


def _contexts(
    call: _Call, settings: Settings, states: dict[str, Tensor], theirs: Contexts | None
) -> tuple[_Anew, _Anew]:
    """Return the contexts of the first run and of recomputations."""
    of_forward, of_recomputation = (None, None) if theirs is None else theirs()

    def enter_forward(stack: ExitStack) -> None:
        stack.enter_context(_watched(settings, "forward", call.name))
        if of_forward is not None:
            stack.enter_context(of_forward)

    def enter_recomputation(stack: ExitStack) -> None:
        stack.enter_context(_watched(settings, "recomputation", call.name))
        stack.enter_context(replay(states))
        call.restore()
        if of_recomputation is not None:
            stack.enter_context(of_recomputation)

    return _Anew(enter_forward), _Anew(enter_recomputation)


class _Anew:
    """A context that can be entered again, also while it is."""

    def __init__(self, enter: Callable[[ExitStack], None]) -> None:
        self._enter = enter
        self._stacks: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            self._enter(stack)
            self._stacks.append(stack.pop_all())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._stacks.pop().__exit__(kind, error, traceback)


@contextmanager
def _watched(settings: Settings, what: str, name: str) -> Iterator[None]:
    """Wait for the device at both ends, and log the time between them, as far as it is asked for."""
    if not (settings.synchronize_checkpoint_boundary or settings.profile):
        yield
        return
    accelerator = get_accelerator()
    accelerator.synchronize()
    started = time.perf_counter()
    try:
        yield
    finally:
        accelerator.synchronize()
        if settings.profile:
            log_dist(f"{what} of {name}: {1000 * (time.perf_counter() - started):.2f} ms")


def _name(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _anchor(leaves: list[Any]) -> list[Tensor]:
    """Return an empty tensor of the current device where no argument is on a device: torch keeps the random state of
    its arguments' devices, and the function may take its inputs there itself."""
    kind = get_accelerator().device_name()
    if kind == "cpu" or any(isinstance(leaf, Tensor) and leaf.device.type != "cpu" for leaf in leaves):
        return []
    # Not where the device was never used: this would start it. By this name torch asks, too.
    return [torch.empty(0, device=kind)] if getattr(torch.get_device_module(kind), "_initialized", False) else []
