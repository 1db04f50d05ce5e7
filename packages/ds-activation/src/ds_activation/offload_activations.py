"""Hidden states of a Hugging Face model on the host between forward and backward, under DeepSpeed's names.

With gradient checkpointing (``use_reentrant=False``) all that a layer keeps is what it was called with; of that, the
hidden states are the one large tensor of its own. In the context they wait on the host, and come back on a side stream
while backward works on the layers after them::

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with get_checkpoint_hidden_states_offloading_ctx_manager() as offload:
        model(input_ids, labels=labels).loss.backward()
    print(offload.stats)
"""

from __future__ import annotations

import functools
import importlib
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from ds_activation.copy_driver import Driver
from ds_activation.host_copies import CopyStats, Handle, HostCopies
from ds_core.errors import ConfigError, EngineError
from ds_core.log import logger

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from torch import Tensor, nn

__all__ = [
    "CheckpointHiddenStatesOffload",
    "OffloadStats",
    "get_checkpoint_hidden_states_offloading_ctx_manager",
    "patch_gradient_checkpointing_layer",
    "unpatch_gradient_checkpointing_layer",
]

_NEEDS = "transformers>=4.52"


@dataclass
class OffloadStats(CopyStats):
    """What a context has seen. Marked tensors are those offloaded, kept and skipped together."""

    saved_tensors_seen: int = 0
    """Tensors that forward saved for backward inside of the context, outside of checkpointed layers."""
    marked_tensors: int = 0
    """Of those, the hidden states that a checkpointed layer was called with."""
    skipped_marked_tensors: int = 0
    """Of those, the ones that stay because of their kind or size."""


class CheckpointHiddenStatesOffload:
    """A context around forward and backward, in which the inputs of checkpointed layers wait on the host.

    What is offloaded: the first positional argument of each call of a ``transformers.GradientCheckpointingLayer`` that
    is checkpointed. The newest ``keep_last_count`` stay, since backward begins with them. Skipped: tensors on the CPU
    or on a device without streams, parameters and buffers, those smaller than ``min_offload_bytes``, and views that
    repeat memory. A tensor that was brought back stays until its graph is freed, so ``retain_graph=True`` works.

    One instance can be entered again after it was left, not while it is entered.

    Args:
        use_pin_memory: host memory is pinned.
        use_streams: copies run beside the computation.
        min_offload_bytes: smaller tensors stay.
        max_fwd_stash_count: tensors on their way to the host at one time; more wait.
        max_cpu_buffer_pool_count: host buffers kept for the next copies.
        keep_last_count: so many of the newest tensors stay.
        driver: the calls to the device.

    Raises:
        ConfigError: a number is negative.
    """

    def __init__(
        self,
        use_pin_memory: bool = True,
        use_streams: bool = True,
        min_offload_bytes: int = 1024,
        max_fwd_stash_count: int = 2,
        max_cpu_buffer_pool_count: int = 64,
        keep_last_count: int = 1,
        *,
        driver: Driver | None = None,
    ) -> None:
        _refuse_negative(
            min_offload_bytes=min_offload_bytes,
            max_fwd_stash_count=max_fwd_stash_count,
            max_cpu_buffer_pool_count=max_cpu_buffer_pool_count,
            keep_last_count=keep_last_count,
        )
        self.stats = OffloadStats()
        self._driver = Driver() if driver is None else driver
        self._copies = HostCopies(
            keep_last_count,
            min_offload_bytes,
            use_pin_memory,
            use_streams,
            max_cpu_buffer_pool_count,
            max_leaving=max_fwd_stash_count,
            driver=self._driver,
            stats=self.stats,
        )
        self._hooks: saved_tensors_hooks | None = None
        self._entry = 0
        """Counts entries, each of which has its own saved tensors."""
        self._marks: list[Tensor | None] = []
        """What the layers were called with that run now, the innermost last; None once it was saved."""

    def __enter__(self) -> CheckpointHiddenStatesOffload:
        if self._hooks is not None:
            raise EngineError(
                "this CheckpointHiddenStatesOffload is entered already",
                fix="make another one: get_checkpoint_hidden_states_offloading_ctx_manager()",
            )
        _patch(needed=False)
        self._entry += 1
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        _entered().append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._hooks is not None
        self._hooks.__exit__(kind, error, traceback)
        self._hooks = None
        _entered().remove(self)
        unpatch_gradient_checkpointing_layer()
        self._copies.clear()

    @contextmanager
    def marking(self, tensor: Tensor) -> Iterator[None]:
        """Take ``tensor`` for hidden states: the first time it is saved inside, it is offloaded.

        For layers that are checkpointed otherwise than by ``transformers``, around the call of each.
        """
        self._marks.append(tensor)
        try:
            yield
        finally:
            self._marks.pop()

    def _pack(self, tensor: Tensor) -> tuple[int, Handle]:
        self.stats.saved_tensors_seen += 1
        if not self._take_mark(tensor):
            return self._entry, Handle(tensor)
        self.stats.marked_tensors += 1
        if not self._can_leave(tensor):
            self.stats.skipped_marked_tensors += 1
            return self._entry, Handle(tensor)
        return self._entry, self._copies.to_host(tensor)

    def _unpack(self, packed: tuple[int, Handle]) -> Tensor:
        entry, handle = packed
        if self._hooks is None or entry != self._entry:
            raise EngineError(
                "backward came after the context that holds its saved tensors was left",
                where="CheckpointHiddenStatesOffload",
                fix="call backward inside of the context that forward ran in",
            )
        return handle.restore()

    def _take_mark(self, tensor: Tensor) -> bool:
        for at, mark in enumerate(self._marks):
            if mark is not None and _is_same(tensor, mark):
                self._marks[at] = None
                return True
        return False

    def _can_leave(self, tensor: Tensor) -> bool:
        if isinstance(tensor, (torch.nn.Parameter, torch.nn.Buffer)) or not self._copies.can_leave(tensor):
            return False
        repeats = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        return not repeats and self._driver.has_streams(tensor.device)


def get_checkpoint_hidden_states_offloading_ctx_manager(
    use_pin_memory: bool = True,
    use_streams: bool = True,
    min_offload_bytes: int = 1024,
    max_fwd_stash_count: int = 2,
    max_cpu_buffer_pool_count: int = 64,
    keep_last_count: int = 1,
) -> CheckpointHiddenStatesOffload:
    """Return a context for forward and backward of a Hugging Face model with non-reentrant gradient checkpointing.

    Arguments are those of :class:`CheckpointHiddenStatesOffload`.
    """
    return CheckpointHiddenStatesOffload(
        use_pin_memory, use_streams, min_offload_bytes, max_fwd_stash_count, max_cpu_buffer_pool_count, keep_last_count
    )


def patch_gradient_checkpointing_layer() -> None:
    """Let calls of ``transformers.GradientCheckpointingLayer`` tell the context in force what they are called with.

    Entering a context does it, leaving undoes it. Calls count: the class is as it was after as many
    :func:`unpatch_gradient_checkpointing_layer`.

    Raises:
        EngineError: there is no such class: transformers is missing, or too old.
    """
    _patch(needed=True)


def unpatch_gradient_checkpointing_layer() -> None:
    """Undo one :func:`patch_gradient_checkpointing_layer`; without one before, do nothing."""
    global _patches
    with _lock:
        _patches = max(_patches - 1, 0)
        if _patches == 0 and _patched:
            layer, call, had_own, original = _patched.pop()
            # Where somebody has wrapped it since, ours stays inside: it does nothing without a context.
            if layer.__dict__.get("__call__") is call:
                if had_own:
                    layer.__call__ = original
                else:
                    del layer.__call__


_lock = threading.RLock()
_patches = 0
_patched: list[tuple[Any, Any, bool, Any]] = []
"""While patched: the class, what is its ``__call__`` now, whether it had an own one, and which was in force."""
_of_thread = threading.local()


def _entered() -> list[CheckpointHiddenStatesOffload]:
    """The contexts that this thread is in, the innermost last: as torch's hooks are, of one thread."""
    if not hasattr(_of_thread, "contexts"):
        _of_thread.contexts = []
    contexts: list[CheckpointHiddenStatesOffload] = _of_thread.contexts
    return contexts


def _patch(*, needed: bool) -> None:
    global _patches
    layer = _layer_class()
    if layer is None and needed:
        raise EngineError(
            "transformers.GradientCheckpointingLayer is not there to be patched", fix=f"pip install '{_NEEDS}'"
        )
    with _lock:
        _patches += 1
        if layer is None or _patched:
            return
        had_own, original = "__call__" in layer.__dict__, layer.__call__

        @functools.wraps(original)
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            contexts = _entered()
            if not contexts or not args or not isinstance(args[0], torch.Tensor) or not _is_checkpointed(self):
                return original(self, *args, **kwargs)
            with contexts[-1].marking(args[0]):
                return original(self, *args, **kwargs)

        layer.__call__ = call
        _patched.append((layer, call, had_own, original))


def _is_checkpointed(layer: nn.Module) -> bool:
    return layer.training and torch.is_grad_enabled() and bool(getattr(layer, "gradient_checkpointing", False))


@functools.cache
def _layer_class() -> Any | None:
    """Return the class, or None, which is told once."""
    try:
        return importlib.import_module("transformers.modeling_layers").GradientCheckpointingLayer
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "transformers.modeling_layers"):
            raise  # it is installed, and misses something itself
        logger.warning("no hidden states are offloaded by themselves: that takes %s", _NEEDS)
        return None


def _is_same(tensor: Tensor, mark: Tensor) -> bool:
    # Not only the same object: wrappers of a layer (FSDP, ZeRO) pass on another tensor of the same memory.
    return tensor is mark or (
        type(tensor) is type(mark) is torch.Tensor
        and tensor.layout is mark.layout is torch.strided
        and tensor.data_ptr() == mark.data_ptr()
        and (tensor.shape, tensor.stride(), tensor.dtype) == (mark.shape, mark.stride(), mark.dtype)
    )


def _refuse_negative(**values: int) -> None:
    for name, value in values.items():
        if value < 0:
            raise ConfigError(f"{name} is {value}", where="CheckpointHiddenStatesOffload", fix="give 0 or more")
