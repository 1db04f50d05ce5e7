"""Host memory that holds what a rank writes while training goes on: one copy, kept between saves."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ds_core.log import logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ds_core.interfaces.logical import Piece

__all__ = ["HostMemory"]

_ALIGN_BYTES = 64
"""Every tensor begins at a multiple of it: of the size of any dtype, and of a cache line."""


class HostMemory:
    """One flat buffer of bytes, as large as the largest copy so far; pinned once a copy came from a CUDA device.

    Where it cannot be pinned that is told once, and not tried again.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._pin: weakref.finalize[[Tensor], HostMemory] | None = None
        self._can_pin = True

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes

    def copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return ``pieces`` with copies of their data, which the next call overwrites.

        Args:
            pieces: any device, strides and dtype.

        Returns:
            In the same order; the data contiguous, in the dtype of the logical tensor, of the shape that was given.
        """
        dtypes: list[torch.dtype] = [getattr(torch, piece.of.dtype) for piece in pieces]
        places, total = [], 0
        for piece, dtype in zip(pieces, dtypes, strict=True):
            nbytes = piece.data.numel() * dtype.itemsize
            places.append((total, nbytes))
            total += -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
        devices = {piece.data.device for piece in pieces if piece.data.is_cuda}
        buffer = self._of(total, pinned=bool(devices))
        found = []
        with torch.no_grad():
            for piece, dtype, (start, nbytes) in zip(pieces, dtypes, places, strict=True):
                copied = buffer[start : start + nbytes].view(dtype).view(piece.data.shape)
                copied.copy_(piece.data, non_blocking=True)
                found.append(replace(piece, data=copied))
        for device in devices:
            # The weights may change once this returns, and the copies are only queued by now.
            torch.cuda.current_stream(device).synchronize()
        return found

    def release(self) -> None:
        """Let the memory go. What was copied into it stays as long as somebody holds it."""
        if self._pin is not None:
            self._pin()
        self._buffer = self._pin = None

    def _of(self, nbytes: int, *, pinned: bool) -> Tensor:
        """Return a buffer of at least ``nbytes``."""
        pinned = pinned and self._can_pin
        if self._buffer is None or self.nbytes < nbytes or (pinned and self._pin is None):
            self.release()  # before there is another
            self._buffer = torch.empty(nbytes, dtype=torch.uint8)
            if pinned and nbytes:
                self._pin = _pin(self._buffer, self)
                self._can_pin = self._pin is not None
        return self._buffer


def _pin(buffer: Tensor, owner: HostMemory) -> weakref.finalize[[Tensor], HostMemory] | None:
    """Pin ``buffer`` where it lies; return what undoes it, with ``owner`` at the latest.

    Not ``torch.empty(..., pin_memory=True)``: its allocator rounds up to a power of two, up to twice the memory.
    """
    try:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)))
    except RuntimeError as error:
        logger.warning("host memory for saving in the background is not pinned, copies are slower: %s", error)
        return None
    undo = weakref.finalize(owner, _unpin, buffer)
    undo.atexit = False  # the driver may be gone by then, and pinning ends with the process
    return undo


def _unpin(buffer: Tensor) -> Tensor:
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())))
    return buffer
