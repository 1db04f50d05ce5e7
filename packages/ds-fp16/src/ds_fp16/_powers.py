"""Sums of powers and largest magnitudes of many tensors, and scaling by them: the ops of ds-core do the work."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ds_core import ops
from ds_core.accelerator import get_accelerator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

__all__ = ["as_list", "clip_by", "device_of", "is_norm", "norm_over", "sum_of_powers"]


def norm_over(tensors: Sequence[Tensor], p: float, groups: Sequence[Any]) -> Tensor:
    """Return the p-norm of all elements over ``groups``, 0-d fp64, inf or NaN where one is."""
    value = sum_of_powers(tensors, p)
    # After a sum any inf or NaN is not finite on every rank; a maximum may lose NaN on its way, so it goes beside.
    if p == math.inf:
        both = torch.stack([value.nan_to_num(nan=math.inf, posinf=math.inf), value.isnan().double()])
        for group in groups:
            dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
        return torch.where(both[1] > 0, math.nan, both[0]) if groups else value
    for group in groups:
        dist.all_reduce(value, group=group)
    return value ** (1 / p)


def sum_of_powers(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the sum of the p-th powers of all magnitudes, the largest one if p is inf; 0-d fp64."""
    device = device_of(tensors)
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_device.setdefault(tensor.device, []).append(tensor.detach())
    parts = [_powers_on(there, p, where).to(device) for where, there in by_device.items()]
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=device)
    together = torch.stack(parts)
    return together.amax() if p == math.inf else together.sum()


def _powers_on(tensors: list[Tensor], p: float, device: torch.device) -> Tensor:
    if p == 2:
        sum_of_squares: Callable[[Sequence[Tensor]], Tensor] = ops.best("sum_of_squares", device).implementation
        squares = sum_of_squares(tensors)
        if math.isfinite(squares):
            return squares
    # fp64 has room for the squares of everything but large fp64 numbers.
    norms = torch.stack([torch.linalg.vector_norm(tensor, p, dtype=torch.float64) for tensor in tensors])
    return norms.amax() if p == math.inf else (norms**p).sum()


def clip_by(tensors: Sequence[Tensor], norm: float, max_norm: float, *, eps: float) -> None:
    """Multiply ``tensors`` in place by ``max_norm / (norm + eps)`` where that is below 1, or NaN."""
    factor = max_norm / (norm + eps)
    if factor >= 1:
        return
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    for device, there in by_device.items():
        ops.best("scale_", device).implementation(there, factor)


def device_of(tensors: Sequence[Tensor]) -> torch.device:
    """Return where a number about ``tensors`` is, such that a collective can take it."""
    return tensors[0].device if tensors else get_accelerator().device()


def is_norm(norm: float) -> bool:
    """Return whether ``norm`` is that of finite numbers."""
    return norm >= 0 and math.isfinite(norm)


def as_list(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Return one tensor, or several, as a list."""
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
