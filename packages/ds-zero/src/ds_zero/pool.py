"""Flat memory that is lent again and again: fresh pages cost more than what is written into them."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Pool"]


class Pool:
    """Tensors of one use that are free."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        """The smallest first."""

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Lend a flat tensor of at least ``numel`` elements, whatever is in it.

        The smallest that is free and large enough. If there is none, one that is too small goes and a new one comes, so
        that there are never more than were lent at one time.
        """
        free = self._free.get((dtype, device), [])
        at = bisect_left(free, numel, key=torch.numel)
        if at < len(free):
            return free.pop(at)
        if free:
            free.pop()
        return torch.empty(numel, dtype=dtype, device=device)

    def give_back(self, room: Tensor) -> None:
        """Take back what :meth:`take` lent."""
        insort(self._free.setdefault((room.dtype, room.device), []), room, key=torch.numel)

    def clear(self) -> None:
        """Let go of what is free."""
        self._free.clear()
