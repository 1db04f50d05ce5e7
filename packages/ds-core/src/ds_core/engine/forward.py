"""The module's forward in the plan's precision: inputs cast, and under the plan's autocast or none."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from ds_core.log import log_dist

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from ds_core.interfaces.precision import PrecisionPlan

__all__ = ["build_forward"]


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


def _under_autocast(module: nn.Module, dtype: torch.dtype | None, device_type: str) -> Callable[..., Any]:
    told = False

    def tell_once() -> None:
        nonlocal told
        if not told:
            told = True
            _tell(dtype, torch.get_autocast_dtype(device_type))

    def without(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(device_type):
            return module(*args, **kwargs)
        tell_once()
        with torch.autocast(device_type, enabled=False):
            return module(*args, **kwargs)

    def under(*args: Any, **kwargs: Any) -> Any:
        other = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) != dtype
        if other:
            tell_once()
        # torch keeps cast weights until the outermost autocast ends, and does not ask in which dtype (torch 2.13).
        with torch.autocast(device_type, dtype=dtype, cache_enabled=not other):
            return module(*args, **kwargs)

    return without if dtype is None else under


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
