"""A save in the background: a thread that the end of a program waits for, and a failure that somebody is told of.

Note: the end of a program
    The thread is no daemon, so the interpreter waits for it once the script has ended; where that takes longer than a
    moment, one line says so. Then the functions of ``atexit`` run, and a failure nobody was told of ends the process
    with exit code 1: a script that ended well but has no checkpoint did not end well.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING

from ds_core import comm
from ds_core.checkpoint.folder import is_url
from ds_core.errors import CheckpointError, DsError
from ds_core.log import logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from ds_core.interfaces.checkpoint import Directory

__all__ = ["Flight", "forget"]

_LOOK_S = 0.5
"""How often a save looks whether the script has ended; also how long the end of it may take unseen."""
_REDRAW_S = 0.1

_untold: list[Flight] = []
"""Saves that failed, and nobody was told."""
_lanes: weakref.WeakValueDictionary[str, Flight] = weakref.WeakValueDictionary()
"""The save that was started last, by where it goes."""


class Flight:
    """One save in the background, from its start until its end was told.

    Args:
        work: writes the checkpoint, in a thread of its own; it gets :meth:`count`.
        directory: where it goes. Saves of one process into one directory are written in the order they were started,
            also those of several engines, so that ``latest`` names the last one. Every rank starts them in one order.
        label: what it is, for people: ``checkpoint 'step_100' in /runs/7``.
        total_bytes: how much this rank writes.
        speaks: whether this rank is the one that says what a program waits for at its end.
    """

    def __init__(
        self,
        work: Callable[[Callable[[int], None]], None],
        *,
        directory: Directory,
        label: str,
        total_bytes: int,
        speaks: bool,
    ) -> None:
        self._work: Callable[[Callable[[int], None]], None] | None = work
        self._lane = str(directory) if is_url(directory) else os.path.realpath(directory)
        self._before: Flight | None = None
        self._label, self._total_bytes, self._speaks = label, total_bytes, speaks
        self._done = threading.Event()
        self._decided = threading.Event()
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, name="ds-checkpoint", daemon=False)
        self._count_lock = threading.Lock()
        self.written_bytes = 0
        self.failure: DsError | None = None

    def prepare(self) -> None:
        """Start the thread, which waits for :meth:`begin` or :meth:`cancel`.

        So several ranks can agree that all of them could, before one of the threads waits for the others'.

        Raises:
            CheckpointError: there can be no more threads. Nothing was begun.
        """
        try:
            self._thread.start()
        except (RuntimeError, MemoryError) as error:
            self._work = None  # lets go of what it holds
            raise CheckpointError(
                f"the thread that writes the checkpoint cannot be started: {error}",
                where=self._label,
                fix="use fewer threads or raise the limit (ulimit -u); or set checkpoint.engine to one that saves "
                "without a thread",
            ) from error

    def begin(self) -> None:
        """Let the work begin; from now on the ends of the process group and of the program wait for it."""
        atexit.unregister(_tell_at_exit)
        atexit.register(_tell_at_exit)
        comm.wait_before_destroy(self)
        self._before, _lanes[self._lane] = _lanes.get(self._lane), self
        self._decided.set()

    def cancel(self) -> None:
        """Have the thread end without its work. Nothing happens where none was started."""
        self._cancelled = True
        self._decided.set()

    def start(self) -> None:
        """Prepare and begin."""
        self.prepare()
        self.begin()

    def count(self, nbytes: int) -> None:
        """Note that ``nbytes`` more are written; from any thread."""
        with self._count_lock:
            self.written_bytes += nbytes

    def wait(self) -> None:
        """Return once the save has ended, one way or the other."""
        self._thread.join()
        if not self._done.is_set():
            self.failure = CheckpointError(
                "this process is a fork of the one that saves, and does not have its threads",
                where=self._label,
                fix="load and save in the process that started the save, or commit before the fork",
            )

    def told(self) -> None:
        """Note that somebody is told of the failure now; then the end of the program is not."""
        if self in _untold:
            _untold.remove(self)

    def _run(self) -> None:
        self._decided.wait()
        if self._cancelled:
            self._work = None
            self._done.set()
            return
        try:
            if self._speaks:
                self._start_watch()
            if self._before is not None:
                self._before.wait()
            assert self._work is not None
            self._work(self.count)
        except DsError as error:
            self.failure = error
        except BaseException as error:
            # Whatever it is: nothing else hears of what happens in a thread.
            self.failure = CheckpointError(
                f"the checkpoint was not saved: {type(error).__name__}: {error}", where=self._label
            )
            self.failure.__cause__ = error
        finally:
            self._work = self._before = None  # lets go of what they hold
            if self.failure is not None:
                _untold.append(self)
            self._done.set()

    def _start_watch(self) -> None:
        # Beside the work and not in it: most of the time goes by inside calls that write and sync.
        try:
            threading.Thread(target=self._watch, name="ds-checkpoint-watch", daemon=False).start()
        except (RuntimeError, MemoryError) as error:
            logger.debug("nobody will say that the end of the script waits for %s: %s", self._label, error)

    def _watch(self) -> None:
        main = threading.main_thread()
        while not self._done.wait(_LOOK_S):
            if not main.is_alive():
                self._show()
                return

    def _show(self) -> None:
        """Say what the end of the program waits for: one line, or a bar on a terminal."""
        if sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
            with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
                task = bar.add_task(f"saving {self._label}", total=self._total_bytes)
                ended = False
                while not ended:
                    ended = self._done.wait(_REDRAW_S)
                    bar.update(task, completed=self.written_bytes)
                    bar.refresh()
            return
        logger.warning(
            "the script has ended, still saving %s: %.1f of %.1f MB written",
            self._label,
            self.written_bytes / 1e6,
            self._total_bytes / 1e6,
        )


def forget() -> None:
    """Forget the failures that nobody was told of; for tests."""
    _untold.clear()
    _lanes.clear()


def _tell_at_exit() -> None:
    if not _untold:
        return
    for flight in _untold:
        print(f"{flight._label} was not saved: {flight.failure}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # An exception out of an atexit function is printed and leaves the exit code at 0, and so does sys.exit() there.
    # What other atexit functions would have done is lost; a job that went on as if its checkpoint were there is worse.
    os._exit(1)
