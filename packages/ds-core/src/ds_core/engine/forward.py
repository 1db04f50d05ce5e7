"""The module's forward in the plan's precision: inputs cast, and under the plan's autocast or none."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ds_core.log import log_dist

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import nn

    from ds_core.interfaces.precision import PrecisionPlan

__all__ = ["build_forward", "plan_autocast"]


def build_forward(module: nn.Module, plan: PrecisionPlan, device: torch.device) -> Callable[..., Any]:
    """Return what ``engine(...)`` calls.

    Where the caller is inside an autocast of its own, the plan's word holds, as in DeepSpeed (spec/fp16.md section 12):
    its dtype if it has one, else none. The log says so once.
    """
    forward = _under_autocast(module, plan.autocast, device.type)
    if plan.input_cast is None:
        return forward
    dtype = plan.input_cast

    def with_cast_inputs(*args: Any, **kwargs: Any) -> Any:
        cast = [_cast_floats(value, dtype) for value in args]
        return forward(*cast, **{name: _cast_floats(value, dtype) for name, value in kwargs.items()})

    return with_cast_inputs


def plan_autocast(
    dtype: torch.dtype | None, device_type: str, inside: Callable[[torch.dtype], None] | None = None
) -> AbstractContextManager[object]:
    """Return a context in which the autocast of a plan holds, or none, also where the caller is inside another.

    Args:
        dtype: of the plan, ``PrecisionPlan.autocast``.
        device_type: such as ``"cuda"``.
        inside: called with the dtype of the caller's autocast, if there is one to another dtype.
    """
    outer = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    another = None if outer == dtype else outer
    if another is not None and inside is not None:
        inside(another)
    if dtype is None:
        return nullcontext() if another is None else torch.autocast(device_type, enabled=False)
    # torch keeps cast weights until the outermost autocast ends, and does not ask in which dtype (torch 2.13).
    return torch.autocast(device_type, dtype=dtype, cache_enabled=None if another is None else False)


def _under_autocast(module: nn.Module, dtype: torch.dtype | None, device_type: str) -> Callable[..., Any]:
    told = False

    def tell_once(outer: torch.dtype) -> None:
        nonlocal told
        if not told:
            told = True
            _tell(dtype, outer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if dtype is None and not torch.is_autocast_enabled(device_type):
            return module(*args, **kwargs)  # most calls are of this kind, and need no context
        with plan_autocast(dtype, device_type, tell_once):
            return module(*args, **kwargs)

    return forward


def _tell(dtype: torch.dtype | None, outer: torch.dtype) -> None:
    if dtype is None:
        log_dist(
            f"forward is called inside torch.autocast to {outer}, which is switched off for the model: "
            'enable "torch_autocast" in the configuration instead',
            level=logging.WARNING,
        )
    else:
        log_dist(f"forward is called inside torch.autocast to {outer}; the configuration's {dtype} holds for the model")


def _cast_floats(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    from torch.utils._pytree import tree_map_only

    return tree_map_only(torch.Tensor, lambda tensor: _cast_floats(tensor, dtype), value)
