"""The forward of a block of an unmodified model: the original one, its activations kept or not."""

from __future__ import annotations

import copy
import functools
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _NormBase

from ds_activation import settings
from ds_activation.call import run
from ds_activation.choice import Decision
from ds_activation.copy_state import without_gaps
from ds_activation.host_copies import Handle, host_copies
from ds_activation.selective import explained_contexts, selective_contexts, without_cached_casts
from ds_activation.storages import fixed_storages, storages_of
from ds_core.errors import EngineError
from ds_core.log import log_dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from ds_activation.profile import Measurement

__all__ = ["CheckpointedForward", "attach_forwards"]


def attach_forwards(
    blocks: Sequence[tuple[str, nn.Module]], decisions: Sequence[Decision]
) -> list[CheckpointedForward]:
    """Exchange the forwards of ``blocks``, whose names, classes and states stay; ``detach`` of each puts it back."""
    forwards = []
    for at, ((name, block), decision) in enumerate(zip(blocks, decisions, strict=True)):
        forwards.append(CheckpointedForward(block, decision, at, name))
        block.forward = forwards[-1]
    return forwards


class CheckpointedForward:
    """Calls the forward that a block had, as the decision says wherever gradients are on.

    An attribute of the block, so a copy or a pickle of the block has one of its own.
    """

    measurement: Measurement | None = None
    """Set while a forward is measured; not copied."""

    def __init__(self, block: nn.Module, decision: Decision, at: int, name: str) -> None:
        # Weak, or the block would go only when Python looks for cycles, and its parameters with it.
        self._block = weakref.ref(block)
        self._before: Callable[..., Any] | None = block.__dict__.get("forward")
        self.decision, self.at, self.is_on = decision, at, True
        self._name = f"the block {name!r}"

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What is called in the end; ``inspect.signature`` looks here."""
        block = self._block()
        assert block is not None, "the forward of a module that is gone"
        # A partial holds the block: a recomputation may come when nobody else does.
        return functools.partial(type(block).forward, block) if self._before is None else self._before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self.__wrapped__
        if not self.is_on or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self._traced(function, args, kwargs)
        block, measurement = self._block(), self.measurement
        args, kwargs = _without_caches(args, kwargs, block, self._name)
        if measurement is None or block is None:
            return self._run(function, args, kwargs)
        return measurement.call(self.at, block, function, args, kwargs, self._run)

    def detach(self) -> None:
        """Put back what the block had. Safe to repeat."""
        block = self._block()
        if block is not None and block.__dict__.get("forward") is self:
            if self._before is None:
                del block.forward
            else:
                block.forward = self._before
        # Somebody may have put another forward around this one.
        self.is_on, self.measurement = False, None

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.decision is Decision.KEEP:
            return function(*args, **kwargs)
        if self.decision is Decision.OFFLOAD:
            block = self._block()
            assert block is not None
            with _offloaded(block, args, kwargs):
                return function(*args, **kwargs)
        contexts = None
        if self.decision is Decision.SELECTIVE:
            contexts = functools.partial(explained_contexts, self._name)
            function = without_cached_casts(function)
        norms = _norms(self._block())
        if norms:
            contexts = functools.partial(_statistics_kept, norms, contexts)
        buffers = _buffers(self._block(), norms)
        result = run(function, args, kwargs, settings.current(), context_fn=contexts, name=self._name)
        changed = [name for name, was in buffers.items() if _buffers(self._block(), norms).get(name) != was]
        if changed:
            raise EngineError(
                f"{self._name} changes its buffer {changed[0]!r}, so computed again it would see another value, and "
                "count twice",
                where="activation checkpointing, a forward with gradients on",
                fix='leave the block out of "modules", or keep what changes outside of it',
            )
        return result

    def _traced(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # torch.compile follows torch's checkpoint; hooks and copies to the host it would not.
        if self.decision is Decision.KEEP:
            return function(*args, **kwargs)
        contexts = selective_contexts if self.decision is Decision.SELECTIVE else None
        return run(function, args, kwargs, _PLAIN, context_fn=contexts)

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointedForward:
        block = self._block()
        new = copy.copy(self)
        new.measurement = None
        # The block's copy is under way where it is the block that is copied.
        of_copy = memo.get(id(block), block)
        assert of_copy is not None, "the forward of a module that is gone"
        new._block = weakref.ref(of_copy)
        new._before = copy.deepcopy(self._before, memo)
        return new

    def __copy__(self) -> CheckpointedForward:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_block": self._block(), "measurement": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _block=weakref.ref(state["_block"]))


def _norms(block: nn.Module | None) -> list[_NormBase]:
    """Return the layers of ``block`` that a forward changes: those with running statistics."""
    modules = () if block is None else block.modules()
    return [one for one in modules if isinstance(one, _NormBase) and one.training and one.track_running_stats]


def _buffers(block: nn.Module | None, norms: list[_NormBase]) -> dict[str, tuple[int, int]]:
    """Return identity and version of each buffer but running statistics, which no recomputation moves."""
    if block is None:
        return {}
    spared = {id(buffer) for norm in norms for buffer in norm.buffers()}
    named = block.named_buffers()
    return {name: (id(buffer), buffer._version) for name, buffer in named if id(buffer) not in spared}


def _statistics_kept(norms: list[_NormBase], contexts: Callable[[], tuple[Any, Any]] | None) -> tuple[Any, Any]:
    first, second = (nullcontext(), nullcontext()) if contexts is None else contexts()
    return first, _Statistics(norms, second)


class _Statistics:
    """The context of a recomputation which moves no running statistics: the first run did. May be entered again."""

    def __init__(self, norms: list[_NormBase], inner: Any) -> None:
        self._norms, self._inner = norms, inner
        self._before: list[list[tuple[Tensor, Tensor]]] = []

    def __enter__(self) -> None:
        # Outside of the inner context, which may count operations.
        self._before.append([(buffer, buffer.clone()) for norm in self._norms for buffer in norm.buffers()])
        self._inner.__enter__()

    def __exit__(self, *exc: object) -> None:
        try:
            self._inner.__exit__(*exc)
        finally:
            for buffer, before in self._before.pop():
                buffer.data.copy_(before)


_PLAIN = settings.Settings()
_told = False


def _without_caches(
    args: tuple[Any, ...], kwargs: dict[str, Any], block: nn.Module | None, name: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Leave out the caches of keys and values that transformers' models make by default, in training too.

    A block adds to the cache; computed again, it would add a second time. transformers' own checkpointing leaves them
    out too.

    Raises:
        EngineError: one has something for the block: a prefix, or keys of an earlier call.
    """
    global _told
    caches = [value for value in (*args, *kwargs.values()) if _is_cache(value)]
    if not caches:
        return args, kwargs
    if any(_is_filled(cache, block) for cache in caches):
        raise EngineError(
            f"{name} is given a cache that has keys and values already; computed again it would add to them twice",
            where="activation checkpointing, a forward with gradients on",
            fix='leave the block out of "modules", or call the model without past_key_values',
        )
    if not _told:
        _told = True
        log_dist(
            "activation checkpointing: while gradients are on, caches of keys and values are not filled "
            "(as with use_cache=False)"
        )
    named = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
    if "use_cache" in named:
        named["use_cache"] = False
    return tuple(None if _is_cache(value) else value for value in args), named


def _is_filled(cache: Any, block: nn.Module | None) -> bool:
    """Return whether ``cache`` has keys for ``block``, not only for blocks without checkpointing, which add theirs."""
    layers = (getattr(module, "layer_idx", None) for module in (() if block is None else block.modules()))
    layer = next((layer for layer in layers if isinstance(layer, int)), 0)
    return hasattr(cache, "get_seq_length") and bool(cache.get_seq_length(layer))


def _is_cache(value: Any) -> bool:
    return any(base.__name__ == "Cache" and base.__module__.startswith("transformers.") for base in type(value).__mro__)


@contextmanager
def _offloaded(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Have what autograd saves inside copied to the host, but for parameters, buffers and the block's inputs.

    Inputs stay: the block before, or another one, may hold them as well.
    """
    stay = fixed_storages(block) | {storage._cdata for storage in storages_of(args, kwargs)}
    copies: Any = None
    taken: dict[tuple[Any, ...], tuple[weakref.ref[Any], Any]] = {}

    def pack(tensor: Tensor) -> Any:
        nonlocal copies
        storages = list(storages_of(tensor))
        if not torch._C._has_storage(tensor) or not storages or any(one._cdata in stay for one in storages):
            return Handle(tensor)  # which sees whether it is changed; torch does not, where hooks are set
        storage = storages[0]
        # What several ops save is copied once, also where it has other sizes: a product sees [B, T, D] as [B * T, D].
        is_dense = without_gaps(tensor) is tensor
        sizes = tensor.numel() if is_dense else (tensor.shape, tensor.stride())
        flags = tensor.dtype, tensor.is_conj(), tensor.is_neg()
        key = (storage._cdata, tensor.storage_offset(), sizes, flags, tensor._version)
        known = taken.get(key)
        # A storage that is gone may have another in its place.
        if known is not None and known[0]() is not None:
            return _View(known[1], tensor.shape, tensor.stride()) if is_dense else known[1]
        # No tensor stays: the budget counts on it.
        copies = copies or host_copies(tensor.device, keep_last=0)
        moved = copies.to_host(tensor)
        taken[key] = weakref.ref(storage), moved
        return moved

    with torch.autograd.graph.saved_tensors_hooks(pack, _fetch):
        yield


@dataclass(frozen=True)
class _View:
    """What is on the host without gaps, seen with other sizes."""

    handle: Handle
    size: Sequence[int]
    stride: Sequence[int]

    def restore(self) -> Tensor:
        tensor = self.handle.restore()
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset())


def _fetch(packed: Any) -> Any:
    return packed.restore()
