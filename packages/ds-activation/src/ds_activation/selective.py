"""Selective recomputation: results of matrix products, convolutions and attention are kept, the rest is run again."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ds_core.accelerator import get_accelerator
from ds_core.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["explained_contexts", "is_kept", "selective_contexts", "without_cached_casts"]

_NAMES = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)


@cache
def _ops() -> frozenset[Any]:
    # Not every torch has every one.
    return frozenset(getattr(torch.ops.aten, name).default for name in _NAMES if hasattr(torch.ops.aten, name))


def is_kept(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether the result of an op is kept.

    Attention with dropout is not: it draws from the random generator, and left out in the second run, everything after
    it would draw other numbers than in the first.
    """
    return op in _ops() and not _dropout(op, args, kwargs)


def _dropout(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    for at, argument in enumerate(op._schema.arguments):
        if argument.name == "dropout_p":
            value = args[at] if at < len(args) else kwargs.get("dropout_p", argument.default_value)
            return float(value or 0.0)
    return 0.0


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(op, args, kwargs) else CheckpointPolicy.PREFER_RECOMPUTE


def selective_contexts() -> tuple[Any, Any]:
    """Return the contexts of the two runs of one checkpointed call: a ``context_fn``."""
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(_policy)
    return contexts


def explained_contexts(name: str) -> tuple[Any, Any]:
    """Return :func:`selective_contexts` with errors that say what to do; not for what torch compiles.

    They are of a kept result that was changed in place, and of a second backward; ``name`` is what they call the block.
    """
    first, second = selective_contexts()
    return first, _Explained(second, name)


class _Explained:
    """The context of the second run, where torch finds that it has not what it needs. May be entered again."""

    def __init__(self, inner: Any, name: str) -> None:
        self._inner, self._name = inner, name

    def __enter__(self) -> None:
        self._inner.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, traceback)
        # Of no class of its own; those of the block's operations are raised elsewhere.
        if kind is RuntimeError and _raised_in(traceback) == torch.utils.checkpoint.__name__:
            raise EngineError(
                f"what was kept of {self._name} is no longer what computing it again needs: {error}",
                where="activation checkpointing, backward through a block under selective recomputation",
                fix='set policy to "full", or to "auto" where an operation changes the result of a product in place,'
                ' or leave the block out of "modules"',
            ) from error


def _raised_in(traceback: TracebackType | None) -> str:
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__"))


def without_cached_casts(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` so that its operations do not depend on what autocast has cast before.

    The second run is compared with the first, operation by operation, and has no cast weights at hand that another use
    of them has left. So the gradients of a weight that is used several times are added in its dtype, not in autocast's.
    """
    kinds = dict.fromkeys(("cpu", get_accelerator().device_name()))
    on = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]
    if not on:
        return function

    def uncached(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for kind, dtype in on:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            return function(*args, **kwargs)

    return uncached
