"""Selective recomputation: results of matrix products, convolutions and attention are kept, the rest is run again."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

__all__ = ["is_kept", "selective_contexts"]

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
