"""What the operating system offers to find and end every process of a job.

Note: who owns a process. On Linux the agent is a *child subreaper*: a process whose parent dies becomes the agent's
child, whatever session or group it moved to, so the agent's descendants are all there is. Every process also carries
the job's id in its environment (:data:`MARK`), which finds it where there is no subreaper, or after the agent itself
was killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
from psutil import Process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "MARK",
    "Process",
    "become_subreaper",
    "children",
    "descendants",
    "die_with_parent",
    "end_marked",
    "marked",
    "send",
    "signal_name",
]

MARK = "DS_LAUNCHER_JOB"
"""Environment variable of every rank: the id of its job."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> bool:
    """Make this process the parent of its orphaned descendants; return whether the system can (Linux)."""
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> Callable[[], None]:
    """Return a function for ``Popen(preexec_fn=...)``: the child gets SIGKILL when this process dies (Linux)."""
    parent = os.getpid()
    prctl = _load_prctl()  # before the fork: the child must not load libraries

    def apply() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        # The parent may have died between the fork and the call above; nobody would tell us any more.
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)

    return apply


def descendants() -> list[Process]:
    """Return the living processes below this one, zombies left out."""
    found = []
    for process in Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def children() -> list[Process]:
    """Return the direct children of this process, zombies included."""
    found: list[Process] = Process().children()
    return found


def marked(job_id: str) -> list[Process]:
    """Return the living processes that carry ``job_id`` in their environment, this one left out."""
    found = []
    for process in psutil.process_iter():
        # Other users' processes cannot be read, and processes come and go while we look: neither can be ours for long.
        with suppress(psutil.AccessDenied, psutil.NoSuchProcess, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == job_id:
                found.append(process)
    return found


def send(processes: Iterable[Process], number: int) -> None:
    """Send a signal to each; those gone meanwhile are skipped (psutil checks that the pid is still the same)."""
    for process in processes:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.send_signal(number)


def end_marked(job_id: str, *, timeout_s: float = 5.0) -> list[int]:
    """Kill every process marked with ``job_id``; return the pids that are still there after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    alive = marked(job_id)
    while alive and time.monotonic() < deadline:
        send(alive, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=max(0.0, deadline - time.monotonic()))
        alive = marked(job_id)  # again: one of them may have forked before it died
    return [process.pid for process in alive]


def signal_name(number: int) -> str:
    """Return the name of a signal.

    >>> signal_name(9)
    'SIGKILL'
    """
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _load_prctl() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    prctl.restype = ctypes.c_int
    function: Callable[..., int] = prctl
    return function


def _prctl(option: int, value: int) -> bool:
    prctl = _load_prctl()
    return prctl is not None and prctl(option, value, 0, 0, 0) == 0
