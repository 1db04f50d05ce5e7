"""Flat memory that is lent again and again: fresh pages cost more than what is written into them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Pool"]


class Pool:
    """Tensors of one use that are free, and how many bytes were made in all."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self.nbytes = 0
        """Of what is free and what is lent."""

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Lend a flat tensor of at least ``numel`` elements, whatever is in it.

        The smallest that is free and large enough. If there is none, one that is too small goes and a new one comes, so
        that there are never more than were lent at one time.
        """
        same = [room for room in self._free if room.dtype == dtype and room.device == device]
        large = [room for room in same if room.numel() >= numel]
        if large:
            room = min(large, key=torch.numel)
            self._remove(room)
            return room
        if same:
            small = max(same, key=torch.numel)
            self._remove(small)
            self.nbytes -= small.nbytes
        room = torch.empty(numel, dtype=dtype, device=device)
        self.nbytes += room.nbytes
        return room

    def _remove(self, room: Tensor) -> None:
        self._free = [other for other in self._free if other is not room]

    def give_back(self, room: Tensor) -> None:
        """Take back what :meth:`take` lent."""
        self._free.append(room)

    def clear(self) -> None:
        """Let go of what is free."""
        self.nbytes -= sum(room.nbytes for room in self._free)
        self._free.clear()
