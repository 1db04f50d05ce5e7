"""Copies of tensors on the host while nobody needs them: on a side stream, in pinned memory lent again and again.

Note: the order of things
    All copies of a device go through one side stream, one after the other. What a copy reads or overwrites may still be
    in use by what is queued on the current stream, so the side stream waits for that first. A buffer can be lent again
    as soon as the copy out of it is queued: the next copy into it comes later on the same stream, and nobody else
    reads or writes it.
    Memory of a device belongs to the stream it was made on, and is used there again the moment the tensor is gone. So
    whatever a copy in flight touches is held here until the copy is done, or until that stream waits for it.

Note: the end of a handle
    A handle may die anywhere, also within the code below, when the garbage collector runs. Its end is only written
    down there; the next call settles it.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ds_activation.copy_driver import Driver, Pool
from ds_activation.copy_state import TOUCHED, InFlight, State, dense_part, untouched, version_of
from ds_core.log import logger

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CopyStats", "Handle", "HostCopies", "host_copies"]

_LOOK_BACK = 8
"""How many handles before one are looked at for what backward wants next."""


@dataclass
class CopyStats:
    """What was copied so far."""

    offloaded_tensors: int = 0
    """Tensors copied to the host."""
    restored_tensors: int = 0
    """Of those, the ones that were asked for again."""
    kept_last_tensors: int = 0
    """Tensors that stayed on the device, being among the newest."""
    offloaded_bytes: int = 0
    restored_bytes: int = 0


class Handle:
    """A tensor that will be wanted again; this one stays where it is."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()  # the same memory without the graph, which this may be part of
        self._version = version_of(self._tensor)

    def restore(self) -> Tensor:
        """Return the tensor: its values, shape, dtype and device, without a graph. May be called again.

        Strides are the tensor's where its memory has no gaps, else those of a clone; repeated dimensions stay so.

        Raises:
            EngineError: it was modified in place.
        """
        return untouched(self._tensor, self._version)


class HostCopies:
    """Moves tensors to the host until they are wanted again.

    Tensors on the host already, smaller than ``min_bytes``, empty, sparse, quantized, or of a subclass stay where they
    are, by reference. Safe to call from several threads.

    Args:
        keep_last: so many of the newest tensors stay on the device: backward begins with them.
        min_bytes: smaller tensors stay.
        pin_memory: copies go to pinned memory; where that cannot be had it is told once, and other memory is used.
        use_streams: copies run beside the computation. Else, and on a device without streams, each call waits.
        max_pooled: so many host buffers are kept for the next copies, per device.
        max_leaving: so many tensors are held on the device while they are being copied; with one more, the
            computation waits for the first.
        driver: the calls to the device.
        stats: counted up here; None: an own one.
    """

    def __init__(
        self,
        keep_last: int = 1,
        min_bytes: int = 0,
        pin_memory: bool = True,
        use_streams: bool = True,
        max_pooled: int = 64,
        *,
        max_leaving: int = 2,
        driver: Driver | None = None,
        stats: CopyStats | None = None,
    ) -> None:
        self.stats = CopyStats() if stats is None else stats
        self._keep_last, self._min_bytes, self._max_pooled = keep_last, min_bytes, max_pooled
        self._pin_memory, self._use_streams, self._max_leaving = pin_memory, use_streams, max_leaving
        self._driver = Driver() if driver is None else driver
        self._lock = threading.RLock()
        self._serial = 0
        self._living: weakref.WeakValueDictionary[int, _Moving] = weakref.WeakValueDictionary()
        self._newest: deque[weakref.ref[_Moving]] = deque()
        self._in_flight: deque[InFlight] = deque()
        self._ended: deque[State] = deque()
        self._side_streams: dict[torch.device, Any] = {}
        self._pools: dict[torch.device, Pool] = {}

    def can_leave(self, tensor: Tensor) -> bool:
        """Return whether ``tensor`` is one to be moved."""
        tensor = tensor.detach()  # of a parameter, a plain tensor
        return (
            type(tensor) is torch.Tensor
            and tensor.layout is torch.strided
            and not tensor.is_quantized
            and tensor.numel() > 0
            and tensor.nbytes >= self._min_bytes
            and self._driver.is_on_device(tensor)
        )

    def has_streams(self, device: torch.device) -> bool:
        """Return whether copies from and to ``device`` run beside the computation."""
        return self._use_streams and self._driver.has_streams(device)

    def to_host(self, tensor: Tensor) -> Handle:
        """Return what gives ``tensor`` back later; its own memory is free once the caller lets go of it.

        The computation that made it is queued on the current stream.
        """
        if not self.can_leave(tensor):
            return Handle(tensor)
        with self._lock:
            self._settle()  # first, for the buffers
            self._serial += 1
            handle = _Moving(self, State(tensor.detach(), self._serial))
            self._living[self._serial] = handle
            self._newest.append(weakref.ref(handle))
            self.stats.kept_last_tensors += 1
            while len(self._newest) > self._keep_last:
                oldest = self._newest.popleft()()
                if oldest is not None:
                    self._send(oldest.state)
            self._settle()
        return handle

    def clear(self) -> None:
        """Let go of free buffers, and of all that copies in flight hold. Handles stay good."""
        with self._lock:
            self._settle()
            for handle in list(self._living.values()):
                if handle.state.arriving:
                    state = handle.state
                    self._driver.wait(state.stream, state.arrived)
                    state.arriving = False
            self._settle(may_stay=0)
            self._pools.clear()

    def restored(self, state: State) -> Tensor:
        """Return the tensor of ``state``; begin to fetch the one that backward wants next."""
        with self._lock:
            self._bring(state)
            if state.arrived is not None:
                # Each time: the other times it may have been another stream.
                current = self._driver.current_stream(state.device)
                self._driver.wait(current, state.arrived)
                state.arriving = state.arriving and current != state.stream
                if current != state.stream:
                    self._driver.use_on(state.on_device(), current)
            if not state.was_restored:
                state.was_restored = True
                if state.was_offloaded:
                    self.stats.restored_tensors += 1
                    self.stats.restored_bytes += state.nbytes
                self._bring_one_before(state)
            self._settle()  # last: what is let go of here is no longer on the device to be taken back
            return untouched(state.on_device(), state.version)

    def _send(self, state: State) -> None:
        """Begin the copy to the host, after which the device has no need of the tensor."""
        tensor = state.on_device()
        if version_of(tensor) != state.version:
            return  # its values are lost; restoring it is the error
        dense = dense_part(tensor)
        state.nbytes = dense.nbytes
        state.buffer = self._pool(state.device).take(dense.nbytes)
        meta = torch.empty_like(dense, device="meta")
        state.on_host = state.buffer[: dense.nbytes].view(dense.dtype).as_strided(meta.shape, meta.stride())
        event = self._copy(state.on_host, dense, state)
        state.tensor, state.was_offloaded = None, True
        if event is not None:
            state.leaving = InFlight(dense, version_of(dense), event, state.stream)
            self._in_flight.append(state.leaving)
        self.stats.kept_last_tensors -= 1
        self.stats.offloaded_tensors += 1
        self.stats.offloaded_bytes += state.nbytes

    def _bring(self, state: State) -> None:
        """Begin the copy to the device, if the tensor is not there or on its way."""
        if state.tensor is not None:
            return
        assert state.on_host is not None
        if state.leaving is not None and state.leaving.tensor is not None:
            # Still on the device; the copy to the host is for nothing.
            state.tensor, state.version = state.leaving.tensor.expand(state.shape), state.leaving.version
        else:
            tensor = self._driver.device_memory(state.on_host, state.device)
            state.arrived = self._copy(tensor, state.on_host, state)
            state.arriving = state.arrived is not None
            was_touched = state.leaving is not None and state.leaving.was_touched
            state.tensor, state.version = tensor.expand(state.shape), TOUCHED if was_touched else version_of(tensor)
        self._pool(state.device).give_back(state.take_buffer())

    def _bring_one_before(self, state: State) -> None:
        """Begin to fetch the newest tensor before this one that is on the host; it has time until it is wanted."""
        if not self.has_streams(state.device):
            return
        for serial in range(state.serial - 1, max(state.serial - 1 - _LOOK_BACK, 0), -1):
            before = self._living.get(serial)
            if before is not None and before.state.tensor is None and before.state.device == state.device:
                self._bring(before.state)
                return

    def _copy(self, target: Tensor, source: Tensor, state: State) -> Any | None:
        """Queue a copy; return the event of its end, or None if it is done."""
        driver, device = self._driver, state.device
        if not self.has_streams(device):
            driver.copy(target, source, None)
            return None
        if device not in self._side_streams:
            self._side_streams[device] = driver.new_stream(device)
        side, state.stream = self._side_streams[device], driver.current_stream(device)
        driver.wait(side, driver.record(state.stream))
        driver.copy(target, source, side)
        return driver.record(side)

    def _settle(self, may_stay: int | None = None) -> None:
        """Take back what handles that have ended had, and let go of what no copy touches any more."""
        while self._ended:
            state = self._ended.popleft()
            if state.buffer is not None:
                self._pool(state.device).give_back(state.take_buffer())
            if state.arriving:
                self._in_flight.append(InFlight(state.on_device(), state.version, state.arrived, state.stream))
        may_stay = self._max_leaving if may_stay is None else may_stay
        while self._in_flight and (
            len(self._in_flight) > may_stay or self._driver.has_passed(self._in_flight[0].event)
        ):
            done = self._in_flight.popleft()
            # What comes to lie in that memory is written by this stream.
            self._driver.wait(done.stream, done.event)
            done.let_go()

    def _pool(self, device: torch.device) -> Pool:
        if device not in self._pools:
            self._pools[device] = Pool(self._host_memory, self._max_pooled)
        return self._pools[device]

    def _host_memory(self, nbytes: int) -> Tensor:
        if self._pin_memory:
            try:
                return self._driver.host_memory(nbytes, pinned=True)
            except RuntimeError as error:
                logger.warning("host memory for activations is not pinned, copies are slower: %s", error)
                self._pin_memory = False
        return self._driver.host_memory(nbytes, pinned=False)


_instances: dict[tuple[torch.device, int], HostCopies] = {}  # of the process, so that all models share their buffers


def host_copies(device: torch.device, keep_last: int = 1) -> HostCopies:
    """Return the copies of ``device`` in this process: the newest ``keep_last`` tensors stay, all others leave."""
    if device.type != "cpu" and device.index is None:
        device = torch.device(device.type, torch.get_device_module(device).current_device())
    if (device, keep_last) not in _instances:
        _instances[device, keep_last] = HostCopies(keep_last)
    return _instances[device, keep_last]


def clear_all() -> None:
    """Let go of the memory of all that :func:`host_copies` has returned."""
    for copies in _instances.values():
        copies.clear()


class _Moving(Handle):
    """A handle whose tensor leaves the device."""

    def __init__(self, copies: HostCopies, state: State) -> None:
        self._copies, self.state = copies, state

    def restore(self) -> Tensor:
        return self._copies.restored(self.state)

    def __del__(self) -> None:
        if self.state.buffer is not None or self.state.arriving:
            self._copies._ended.append(self.state)
