"""Rank output: bytes from pipes to the terminal, prefixed, remembered, logged; never decoded, never blocking."""

from __future__ import annotations

import os
import selectors
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Log", "Sink", "Source", "Tail"]

READ_BYTES = 1 << 16
MAX_LINE_BYTES = 1 << 16
"""A longer line is passed on in pieces, so that a rank that never ends a line cannot fill our memory."""
FULL_BYTES = 1 << 20
"""Bytes waiting for a slow terminal at which the ranks' pipes are left to fill: then the ranks wait, as they should."""
PIPE_BUF = 4096
"""A descriptor that polls writable takes this much without blocking (POSIX asks for 512, Linux gives a page)."""
TAIL_LINES = 200
TAIL_LINE_BYTES = 2000

TRACEBACK = b"Traceback (most recent call last):"
CHAINED = (
    b"During handling of the above exception, another exception occurred:",
    b"The above exception was the direct cause of the following exception:",
)


class Tail:
    """The last lines of a rank's stderr, and when its last traceback began.

    Args:
        tick: returns a larger number at every call; one for all ranks, so that their tracebacks can be put in order.
    """

    def __init__(self, tick: Callable[[], int]) -> None:
        self._tick = tick
        self._lines: deque[bytes] = deque(maxlen=TAIL_LINES)
        self._rest = b""
        self.traceback_tick: int | None = None

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            if TRACEBACK in line and not self._continues_a_chain():
                self.traceback_tick = self._tick()
            # A progress bar rewrites its line with "\r"; only what it shows last is of interest.
            self._lines.append(line.rstrip(b"\r").rpartition(b"\r")[2][:TAIL_LINE_BYTES])

    def excerpt(self, count: int = 20) -> tuple[list[str], bool]:
        """Return (the lines from the last traceback on, True), or (the last ``count`` lines, False) without one."""
        lines = [*self._lines, self._rest] if self._rest else list(self._lines)
        text = [line.decode(errors="backslashreplace") for line in lines]
        start = _last_traceback(lines)
        return (text[-count:], False) if start is None else (text[start:], True)

    def _continues_a_chain(self) -> bool:
        recent = [line for line in list(self._lines)[-3:] if line]
        return bool(recent) and recent[-1].strip().endswith(CHAINED)


def _last_traceback(lines: list[bytes]) -> int | None:
    """Return the index at which the last chain of tracebacks begins."""
    start = None
    for index in range(len(lines) - 1, -1, -1):
        if TRACEBACK in lines[index]:
            start = index
            before = [line for line in lines[max(0, index - 3) : index] if line]
            if not (before and before[-1].strip().endswith(CHAINED)):
                break
    return start


class Log:
    """A file that gets a copy of a rank's output. A disk that fills up ends the log, not the job."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.problem: str | None = None
        self._fd: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def write(self, data: bytes) -> None:
        if self._fd is None:
            return
        try:
            _write_all(self._fd, data)
        except OSError as error:
            self.problem = f"{self.path}: {error.strerror}; the log ends there"
            self.close()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class Sink:
    """Where output goes (the launcher's stdout or stderr); written only when it takes bytes without blocking."""

    def __init__(self, fd: int, selector: selectors.BaseSelector) -> None:
        self.fd = fd
        self._selector = selector
        self._pending = bytearray()
        self._is_registered = False
        self._is_broken = False

    @property
    def is_full(self) -> bool:
        return len(self._pending) > FULL_BYTES

    @property
    def is_empty(self) -> bool:
        return not self._pending

    def put(self, data: bytes) -> None:
        if self._is_broken or not data:
            return
        self._pending += data
        if not self._is_registered:
            try:
                self._selector.register(self.fd, selectors.EVENT_WRITE, self.flush)
                self._is_registered = True
            except (PermissionError, ValueError, OSError):
                # Files and /dev/null cannot be waited for: they always take bytes. A closed descriptor takes none.
                self._write(bytes(self._pending))
                self._pending.clear()

    def flush(self) -> None:
        """Called when the descriptor is writable."""
        # Whole lines where possible: rank 0 writes to the same terminal, and a pipe takes this much in one piece.
        end = self._pending.rfind(b"\n", 0, PIPE_BUF) + 1
        written = self._write(bytes(self._pending[: end or PIPE_BUF]), once=True)
        del self._pending[:written]
        if self._is_broken:
            self._pending.clear()
        if not self._pending and self._is_registered:
            self._selector.unregister(self.fd)
            self._is_registered = False

    def _write(self, data: bytes, *, once: bool = False) -> int:
        try:
            return os.write(self.fd, data) if once else _write_all(self.fd, data)
        except BlockingIOError:
            return 0
        except OSError:
            # The reader is gone (``ds run ... | head``). The job goes on; its output has nowhere to go.
            self._is_broken = True
            return 0


class Source:
    """One stream of one rank."""

    def __init__(
        self,
        fd: int,
        sink: Sink,
        selector: selectors.BaseSelector,
        *,
        prefix: bytes = b"",
        tail: Tail | None = None,
        log: Log | None = None,
    ) -> None:
        os.set_blocking(fd, False)
        self.fd, self.sink = fd, sink
        self._selector, self._prefix, self._tail, self._log = selector, prefix, tail, log
        self._rest = b""
        self._is_listening = False
        self.is_open = True

    def listen(self, wanted: bool) -> None:
        """Start or stop waiting for data."""
        if wanted == self._is_listening or not self.is_open:
            return
        if wanted:
            self._selector.register(self.fd, selectors.EVENT_READ, self.read)
        else:
            self._selector.unregister(self.fd)
        self._is_listening = wanted

    def read(self) -> bool:
        """Pass on what is there; return whether there was anything."""
        try:
            data = os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self.close()
            return False
        if self._tail is not None:
            self._tail.feed(data)
        if self._log is not None:
            self._log.write(data)
        self.sink.put(self._prefixed(data) if self._prefix else data)
        return True

    def drain(self) -> None:
        """Read what ended processes left in the pipe, then close."""
        while self.is_open and self.read():
            pass
        self.close()

    def close(self) -> None:
        if not self.is_open:
            return
        self.listen(False)
        if self._rest:
            self.sink.put(self._prefix + self._rest + b"\n")
            self._rest = b""
        self.is_open = False
        os.close(self.fd)

    def _prefixed(self, data: bytes) -> bytes:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            lines, self._rest = [*lines, self._rest], b""
        return b"".join(self._prefix + line + b"\n" for line in lines)


def _write_all(fd: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)
