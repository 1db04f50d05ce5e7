"""A device that a test runs by hand: streams are queues, and nothing on them is done before it is let go on.

The memory of a device tensor that is freed is overwritten by the computation, after what is queued on it by then, and
becomes the next tensor of that size, as a caching allocator does it.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING

import torch

from ds_activation.copy_driver import Driver

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.passed = False


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: deque[Event | Callable[[], None]] = deque()
        """An event of another stream is waited for; everything else is called."""


class FakeDevice(Driver):
    """Tensors of the CPU count as its own, but for those in ``host``.

    Args:
        eager: the computation runs as far as it can at once, and makes those run that it waits for.
        streams: whether it has any.
        can_pin: whether it can.
    """

    def __init__(self, *, eager: bool = True, streams: bool = True, can_pin: bool = True) -> None:
        self.eager, self.streams, self.can_pin = eager, streams, can_pin
        self.compute = Stream("compute")
        self.sides: list[Stream] = []
        self.log: list[str] = []
        """Copies in the order in which they were queued."""
        self.done: list[str] = []
        """Copies in the order in which they were done."""
        self.freed: list[int] = []
        """First addresses of device tensors that are gone."""
        self.buffers: list[tuple[int, bool]] = []
        """Bytes of each host buffer ever made, and whether it is pinned."""
        self._blocks: dict[int, bytearray] = {}
        self._free: dict[int, list[bytearray]] = {}

    # What Driver asks for.

    def is_on_device(self, tensor: Tensor) -> bool:
        return True

    def has_streams(self, device: torch.device) -> bool:
        return self.streams

    def current_stream(self, device: torch.device) -> Stream:
        return self.compute

    def new_stream(self, device: torch.device) -> Stream:
        self.sides.append(Stream(f"side {len(self.sides)}"))
        return self.sides[-1]

    def record(self, stream: Stream) -> Event:
        event = Event(stream)
        self._queue(stream, lambda: setattr(event, "passed", True))
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        self._queue(stream, event)

    def has_passed(self, event: Event) -> bool:
        return event.passed

    def use_on(self, tensor: Tensor, stream: Stream) -> None:
        raise AssertionError("there is one stream of computation")

    def host_memory(self, nbytes: int, *, pinned: bool) -> Tensor:
        if pinned and not self.can_pin:
            raise RuntimeError("CUDA error: out of memory")
        self.buffers.append((nbytes, pinned))
        return torch.full((nbytes,), 0xEE, dtype=torch.uint8)

    def device_memory(self, like: Tensor, device: torch.device) -> Tensor:
        free = self._free.get(like.nbytes)
        block = free.pop() if free else bytearray(b"\xab" * like.nbytes)
        # The tensor holds the view of the block, and no more: when the view is gone, the tensor is.
        view = memoryview(block)
        memory = torch.frombuffer(view, dtype=torch.uint8)
        self._blocks[memory.data_ptr()] = block
        weakref.finalize(view, self._overwrite, memory.data_ptr()).atexit = False
        return memory.view(like.dtype).as_strided(like.shape, like.stride())

    def copy(self, target: Tensor, source: Tensor, stream: Stream | None) -> None:
        name = "to device" if target.untyped_storage().data_ptr() in self._blocks else "to host"
        self.log.append(name)
        into, out_of = self._alias(target), self._alias(source)

        def do() -> None:
            into.copy_(out_of)
            self.done.append(name)

        if stream is None:
            do()
        else:
            assert stream is not self.compute
            self._queue(stream, do)

    # What a test does.

    def tensor(self, values: Tensor) -> Tensor:
        """Return a tensor with ``values``, once the computation has come to it."""
        values = values.detach().clone()
        made = self.device_memory(values, values.device)
        into = self._alias(made)
        self._queue(self.compute, lambda: into.copy_(values))
        return made

    def read(self, tensor: Tensor, into: list[Tensor]) -> None:
        """Let the computation look at ``tensor``."""
        seen = self._alias(tensor)
        self._queue(self.compute, lambda: into.append(seen.clone()))

    def step(self, stream: Stream) -> bool:
        """Do the next thing of ``stream``; return whether there was one that could be done."""
        if not stream.queue:
            return False
        task = stream.queue[0]
        if isinstance(task, Event):
            if not task.passed:
                return False
        else:
            task()
        stream.queue.popleft()
        return True

    def finish(self, stream: Stream | None = None) -> None:
        """Do all of ``stream``, or of every one, and what it waits for."""
        for one in [*self.sides, self.compute] if stream is None else [stream]:
            while one.queue:
                if not self.step(one):
                    awaited = one.queue[0]
                    assert isinstance(awaited, Event)
                    while not awaited.passed:
                        self._do_one(awaited.stream)

    def _do_one(self, stream: Stream) -> None:
        while not self.step(stream):
            awaited = stream.queue[0]  # an IndexError here is an event that was never recorded
            assert isinstance(awaited, Event)
            self._do_one(awaited.stream)

    def _queue(self, stream: Stream, task: Event | Callable[[], None]) -> None:
        stream.queue.append(task)
        if self.eager and stream is self.compute:
            self.finish(stream)

    def _overwrite(self, address: int) -> None:
        block = self._blocks.pop(address)
        self.freed.append(address)
        self._free.setdefault(len(block), []).append(block)

        def do() -> None:
            block[:] = b"\xcd" * len(block)

        self._queue(self.compute, do)

    def _alias(self, tensor: Tensor) -> Tensor:
        """Return the memory of ``tensor`` as a kernel sees it, without holding the tensor, if it is the device's."""
        block = self._blocks.get(tensor.untyped_storage().data_ptr())
        if block is None:
            return tensor.detach()
        flat = torch.frombuffer(block, dtype=torch.uint8).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
