"""The reference implementation of every op of ds-core, in plain torch. It runs on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ds_core.interfaces.ops import Offer, OpProvider

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

__all__ = ["TorchOps", "scale_", "sum_of_squares"]

ROW_NUMEL = 1024
"""Numbers that are summed in fp32 before fp64 takes over; see the bound in :func:`sum_of_squares`."""
SMALL_NUMEL = 2**15
"""Tensors below this are copied together first: reading them twice costs less than a few calls for each."""
TOGETHER_NUMEL = 2**20
"""As many elements are copied together at most."""


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements of ``tensors``, the square of their common L2 norm.

    Rows of 1024 elements are reduced to their norm in fp32 (in fp64 for fp64 tensors); the squares of the norms, and
    of what is left over, are added in fp64.

    Args:
        tensors: floating point, any dtypes and shapes, on one device. Small and not contiguous ones are copied.

    Returns:
        fp64, 0-d, on the device of ``tensors``; 0 on the CPU if there are none. Not finite if an element is not, or if
        the squares of a row exceed the fp32 range.

    Note: the bound
        All terms are positive, so the relative error of a sum is at most u = 2**-24 times the additions that a term
        goes through. A CPU adds a row in at least 4 lanes (8 with AVX2), 1024/4 = 256 additions in each, then at most
        15 of lanes; the square, the root and the root's square (twice its error) make 4 more: (256+15+4) u < 1.7e-5.
        That is for errors all of one sign. Equal elements come near a tenth of it; in random ones the errors mostly
        cancel, within a row and over rows, and stay under 1e-6. Rows of 4096 would not: bf16 squares have so few
        digits that their sums round alike, and the error grows with the row to 1e-6 and more.
        torch.linalg.vector_norm over a whole tensor has no such bound. In 6.5e6 equal elements it is off by 1e-2, in
        random ones by 4e-4, because each lane adds 8e5 terms.
    """
    parts = [part for flat in _flats(tensors) for part in _norms(flat)]
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else None)
    # cat widens mixed dtypes to one that holds all of them exactly.
    wide = (torch.cat(parts) if len(parts) > 1 else parts[0]).double()
    return torch.dot(wide, wide)


def _flats(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield 1-d tensors with all elements of ``tensors``: large ones as they are, small ones together."""
    small: list[Tensor] = []
    numel = 0
    for tensor in tensors:
        flat = (torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()).reshape(-1)
        if flat.numel() >= SMALL_NUMEL:
            yield flat
            continue
        small.append(flat)
        numel += flat.numel()
        if numel > TOGETHER_NUMEL:
            yield torch.cat(small)
            small, numel = [], 0
    if small:
        yield torch.cat(small)


def _norms(flat: Tensor) -> list[Tensor]:
    """Return 1-d tensors whose squares add up to those of ``flat``: norms of its rows, and what is left over."""
    numel = flat.numel()
    if numel < ROW_NUMEL:
        return [flat] if numel else []
    rest = numel % ROW_NUMEL
    dtype = torch.float64 if flat.dtype == torch.float64 else torch.float32
    rows = (flat[:-rest] if rest else flat).view(-1, ROW_NUMEL)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return [norms, flat[-rest:]] if rest else [norms]


@torch.no_grad()
def scale_(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiply ``tensors`` by ``factor`` in place, in one pass over each; a factor of 1 touches nothing.

    Args:
        tensors: any floating dtypes, shapes and devices.
        factor: a Python number. A tensor would have to be waited for, to see whether it is 1.
    """
    if factor != 1 and tensors:
        torch._foreach_mul_(list(tensors), factor)


_OPS: dict[str, Callable[..., Any]] = {"scale_": scale_, "sum_of_squares": sum_of_squares}


class TorchOps(OpProvider):
    """Torch's own kernels."""

    def ops(self) -> frozenset[str]:
        return frozenset(_OPS)

    def offer(self, op: str, device: torch.device) -> Offer:
        return Offer(usable=True, why="plain torch, runs on every device")

    def implementation(self, op: str) -> Callable[..., Any]:
        return _OPS[op]
