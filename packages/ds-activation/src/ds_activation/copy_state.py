"""Where a tensor is that moves between a device and the host, and what in-place changes would make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ds_core.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TOUCHED", "InFlight", "State", "dense_part", "untouched", "version_of", "without_gaps"]


class State:
    """Where the tensor of one handle is, and what its copies need; changed under the lock of its ``HostCopies``."""

    def __init__(self, tensor: Tensor, serial: int) -> None:
        self.serial, self.device, self.shape, self.nbytes = serial, tensor.device, tensor.shape, tensor.nbytes
        self.tensor: Tensor | None = tensor
        self.version = version_of(tensor)
        self.was_offloaded = self.was_restored = False
        self.buffer: Tensor | None = None
        self.on_host: Tensor | None = None
        """The tensor in ``buffer``, while it is lent."""
        self.leaving: InFlight | None = None
        self.arrived: Any | None = None
        """The event of the copy back."""
        self.arriving = False
        """Whether the stream that ``tensor`` was made on has not yet been made to wait for ``arrived``."""
        self.stream: Any | None = None
        """The one that was current when the newest copy was queued."""

    def on_device(self) -> Tensor:
        assert self.tensor is not None
        return self.tensor

    def take_buffer(self) -> Tensor:
        buffer, self.buffer, self.on_host = self.buffer, None, None
        assert buffer is not None
        return buffer


class InFlight:
    """A tensor on the device that a copy in flight reads or writes."""

    def __init__(self, tensor: Tensor, version: int | None, event: Any, stream: Any) -> None:
        self.tensor: Tensor | None = tensor
        self.version, self.event, self.stream = version, event, stream
        self.was_touched = False

    def let_go(self) -> None:
        # Only now: until then somebody could write into what the copy reads.
        assert self.tensor is not None
        self.was_touched = version_of(self.tensor) != self.version
        self.tensor = None


TOUCHED = -1
"""A version that no tensor has."""


def version_of(tensor: Tensor) -> int | None:
    """Return what in-place changes count up; None where they are not counted."""
    return None if tensor.is_inference() else tensor._version


def untouched(tensor: Tensor, version: int | None) -> Tensor:
    # torch compares versions only for tensors that it keeps itself.
    if version_of(tensor) != version:
        raise EngineError(
            f"a tensor that backward needs was modified in place after forward had saved it: "
            f"shape {tuple(tensor.shape)}, dtype {tensor.dtype}",
            fix="replace the in-place operation on it by one that returns a new tensor",
        )
    return tensor.detach()


def dense_part(tensor: Tensor) -> Tensor:
    """Return ``tensor`` without repeats and gaps in its memory: itself, a part of it, or a clone."""
    for dim in range(tensor.dim()):
        if tensor.stride(dim) == 0 and tensor.size(dim) > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return without_gaps(tensor)


def without_gaps(tensor: Tensor) -> Tensor:
    """Return ``tensor``, or a copy of it without gaps and overlaps in its memory."""
    tensor = tensor.resolve_conj().resolve_neg()
    # Only a tensor without them keeps its strides.
    return tensor if torch.empty_like(tensor, device="meta").stride() == tensor.stride() else tensor.clone()
