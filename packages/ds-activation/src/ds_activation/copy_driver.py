"""What copies between a device and the host take: the calls to the device, and host buffers lent again and again."""

from __future__ import annotations

from bisect import bisect_left, insort
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["Driver", "Pool"]


class Driver:
    """The calls to a device. Streams and events are the device's own, and only passed around."""

    def is_on_device(self, tensor: Tensor) -> bool:
        """Return whether the host does not have ``tensor`` already."""
        return tensor.device.type not in ("cpu", "meta")

    def has_streams(self, device: torch.device) -> bool:
        module = torch.get_device_module(device)
        return all(hasattr(module, name) for name in ("Stream", "Event", "current_stream", "stream"))

    def current_stream(self, device: torch.device) -> Any:
        return torch.get_device_module(device).current_stream(device)

    def new_stream(self, device: torch.device) -> Any:
        return torch.get_device_module(device).Stream(device=device)

    def record(self, stream: Any) -> Any:
        """Return an event that passes once ``stream`` has done what is queued on it by now."""
        event = torch.get_device_module(stream.device).Event()
        event.record(stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        """Let what is queued on ``stream`` from now on begin after ``event``; the host does not wait."""
        stream.wait_event(event)

    def has_passed(self, event: Any) -> bool:
        return bool(event.query())

    def use_on(self, tensor: Tensor, stream: Any) -> None:
        """Tell the allocator that ``stream``, another than the one it was made on, uses ``tensor``."""
        tensor.record_stream(stream)

    def host_memory(self, nbytes: int, *, pinned: bool) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)

    def device_memory(self, like: Tensor, device: torch.device) -> Tensor:
        """Return memory of the current stream, with shape, strides and dtype of ``like``, which is dense."""
        return torch.empty_like(like, device=device)

    def copy(self, target: Tensor, source: Tensor, stream: Any | None) -> None:
        """Queue a copy on ``stream``; without one, return when it is done."""
        # Equal dense strides on both sides: this is one transfer, and no step of it runs on the host.
        with nullcontext() if stream is None else torch.get_device_module(stream.device).stream(stream):
            target.copy_(source, non_blocking=stream is not None)


class Pool:
    """Host buffers that are free; never more exist than were lent at one time."""

    def __init__(self, make: Callable[[int], Tensor], max_free: int) -> None:
        self._make, self._max_free = make, max_free
        self._free: list[Tensor] = []
        """The smallest first."""

    def take(self, nbytes: int) -> Tensor:
        """Lend the smallest that is large enough. Without one, a new one comes for one that is too small."""
        at = bisect_left(self._free, nbytes, key=torch.numel)
        if at < len(self._free):
            return self._free.pop(at)
        if self._free:
            self._free.pop()
        return self._make(nbytes)

    def give_back(self, buffer: Tensor) -> None:
        insort(self._free, buffer, key=torch.numel)
        if len(self._free) > self._max_free:
            # The allocator of pinned memory waits for the copies of it that are queued.
            self._free.pop(0)
