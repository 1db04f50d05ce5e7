"""Processes that are killed, and disks that fail, at chosen file operations; and forks that end in time.

Note: what is seen. Every way in which Python itself changes files: creating, writing, syncing, renaming, removing,
folders, links; in any thread, by any function of ``os``, ``io`` and ``pathlib``. Libraries in other languages that
write on their own are not.
"""

from __future__ import annotations

import builtins
import contextlib
import faulthandler
import gc
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

__all__ = [
    "Case",
    "Operation",
    "die_at",
    "ends_of",
    "fork",
    "kill_everywhere",
    "as_json",
    "limited_file_size",
    "ready",
    "run_script",
    "watched",
]

_AUDITED = {
    "os.mkdir": "mkdir",
    "os.rename": "rename",
    "os.remove": "remove",
    "os.rmdir": "rmdir",
    "os.truncate": "truncate",
    "os.link": "link",
    "os.symlink": "link",
}
_WRITES = ("write", "pwrite", "writev", "pwritev", "sendfile", "copy_file_range")
_SYNCS = ("fsync", "fdatasync", "sync")
_CHANGING = os.O_CREAT | os.O_WRONLY | os.O_RDWR | os.O_TRUNC
_REAL_WRITE, _REAL_OPEN = os.write, os.open
MAX_POINTS = 300


@dataclass(frozen=True)
class Operation:
    """A change of a file that is about to be made."""

    name: str
    """``create``, ``write``, ``sync``, ``rename``, ``remove``, ``mkdir``, ``rmdir``, ``truncate`` or ``link``."""
    target: Any
    """A path, absolute or below some open folder, or a descriptor."""
    data: bytes = field(default=b"", repr=False)
    """What is written, where it is known."""

    @property
    def path(self) -> str:
        """Return the path of ``target``, absolute where it is a descriptor."""
        if isinstance(self.target, int):
            return str(Path(f"/proc/self/fd/{self.target}").readlink())
        return os.fsdecode(self.target)


_watchers: list[Callable[[Operation], None]] = []
_inside = threading.local()


@contextlib.contextmanager
def watched(before: Callable[[Operation], None]) -> Iterator[None]:
    """Call ``before`` ahead of every change of a file, in whatever thread; what it raises is what the caller gets."""
    _watchers.append(before)
    if len(_watchers) == 1:
        _patch()
    try:
        yield
    finally:
        _watchers.remove(before)
        if not _watchers:
            _unpatch()


def _tell(name: str, target: Any, data: Any = b"") -> None:
    if getattr(_inside, "busy", False):
        return  # a watcher's own files
    _inside.busy = True
    try:
        for before in list(_watchers):
            before(Operation(name, target, bytes(data)))
    finally:
        _inside.busy = False


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watchers:
        return
    if event in _AUDITED:
        _tell(_AUDITED[event], args[0])
    # A descriptor is of a file that is open already.
    elif event == "open" and not isinstance(args[0], int) and isinstance(args[2], int) and args[2] & _CHANGING:
        _tell("create", args[0])


class _Raw(io.FileIO):
    """A file whose writes are seen, however it is buffered."""

    def write(self, data: Any) -> int:
        _tell("write", self.fileno(), data)
        return super().write(data)


def _open(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
    if not set(mode) & set("wax+") or set(options) - {"encoding", "errors", "newline", "closefd"}:
        return _REAL[io, "open"](file, mode, buffering, *rest, **options)
    raw = _Raw(file, mode.replace("b", "").replace("t", ""), closefd=options.pop("closefd", True))
    if "b" in mode and not buffering:
        return raw
    buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **options)


def _told(name: str, function: str) -> Callable[..., Any]:
    def instead(*args: Any, **options: Any) -> Any:
        _tell(name, args[0] if args else None, args[1] if function == "write" else b"")
        return _REAL[os, function](*args, **options)

    return instead


def _open_path(path: Path, *args: Any, **options: Any) -> Any:
    return _open(path, *args, **options)


_INSTEAD: dict[tuple[Any, str], Any] = {
    (io, "open"): _open,
    (builtins, "open"): _open,
    (Path, "open"): _open_path,
    **{(os, function): _told("write", function) for function in _WRITES if hasattr(os, function)},
    **{(os, function): _told("sync", function) for function in _SYNCS if hasattr(os, function)},
}
_REAL = {(owner, name): getattr(owner, name) for owner, name in _INSTEAD}
_is_hooked = False


def _patch() -> None:
    global _is_hooked
    if not _is_hooked:
        sys.addaudithook(_hook)  # for good: it cannot be taken away
        _is_hooked = True
    for (owner, name), instead in _INSTEAD.items():
        setattr(owner, name, instead)


def _unpatch() -> None:
    for (owner, name), real in _REAL.items():
        setattr(owner, name, real)


def die_at(
    *,
    point: int | None = None,
    nbytes: int | None = None,
    only: Collection[str] | None = None,
    note: Path | None = None,
) -> None:
    """Let this process kill itself from now on; in the midst of a write counts as a point of its own.

    Args:
        point: before the operation of this number, from 0.
        nbytes: once so many bytes were written, to whatever files, the last write cut there.
        only: names of the operations that count; None: all.
        note: gets the name of the operation.
    """
    lock, seen, written = threading.Lock(), 0, 0

    def die(operation: Operation, upto: int, name: str) -> None:
        if upto:
            _REAL_WRITE(operation.target, operation.data[:upto])
        if note is not None:
            _REAL_WRITE(_REAL_OPEN(note, os.O_WRONLY | os.O_CREAT), name.encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def before(operation: Operation) -> None:
        nonlocal seen, written
        with lock:
            if nbytes is not None and written + len(operation.data) > nbytes:
                die(operation, nbytes - written, operation.name)
            written += len(operation.data)
            if only is not None and operation.name not in only:
                return
            half = len(operation.data) // 2
            for name, upto in [(operation.name, 0), *([("half a write", half)] if half else [])]:
                if seen == point:
                    die(operation, upto, name)
                seen += 1

    _watchers.append(before)
    _patch()


@contextlib.contextmanager
def limited_file_size(size: int) -> Iterator[None]:
    """Let writes of this process fail (EFBIG) where a file would exceed ``size`` bytes: as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fork(work: Callable[..., object], *args: Any, timeout_s: float = 60.0, **options: Any) -> int:
    """Run ``work`` in a fork of this process and return its id; it ends with 0, or with 1 and a traceback.

    After ``timeout_s`` it shows where its threads are and ends: a rank whose peer was killed must end by itself.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler.dump_traceback_later(timeout_s, exit=True)
            work(*args, **options)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def ends_of(pids: Sequence[int], timeout_s: float = 90.0) -> list[int]:
    """Wait for children and return how each ended: its exit code, or minus the signal; kill what does not end."""
    ends: dict[int, int] = {}
    until = time.monotonic() + timeout_s
    while len(ends) < len(pids):
        for pid in pids:
            if pid not in ends and (status := os.waitpid(pid, os.WNOHANG))[0]:
                ends[pid] = os.waitstatus_to_exitcode(status[1])
        if time.monotonic() > until:
            for pid in set(pids) - set(ends):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise AssertionError(f"processes did not end within {timeout_s:g} s")
        time.sleep(0.002)
    return [ends[pid] for pid in pids]


@dataclass(frozen=True)
class Case:
    """One save that was killed."""

    name: str
    rank: int
    point: int
    operation: str
    loaded: int
    """What the check found afterwards."""


def kill_everywhere(
    root: Path,
    before: Path,
    world_size: int,
    names: Sequence[str],
    save: Callable[[Path, int, Path, str], object],
    check: Callable[[Path, str], int],
    *,
    only: Collection[str] | None = None,
    at_once: int = 4,
) -> list[Case]:
    """Kill a save at every operation of every rank, and look each time at what is left.

    Call it in a process without threads that has imported everything: it forks for each process of each case.

    Args:
        root: an empty folder.
        before: its copies are saved into.
        world_size: ranks that save together.
        names: of the cases, given to ``save`` and ``check``.
        save: called on every rank with (folder, rank, a file to meet at, name). It calls :func:`ready` when
            what is to be killed begins.
        check: called with (folder, name) once all ranks have ended; returns what it found.
        only: see :func:`die_at`.
        at_once: how many cases run at the same time: most of a case is waiting.
    """
    gc.freeze()  # else each fork's collector touches, and so copies, all that was imported
    cases: list[Case] = []
    for name in names:
        for victim in range(world_size):
            for first in range(0, MAX_POINTS, at_once):
                points = range(first, first + at_once)
                found = _kill_some(root, before, world_size, name, victim, points, save, check, only)
                cases += found
                if len(found) < at_once:
                    break
            else:
                raise AssertionError(f"a save of more than {MAX_POINTS} operations")
    return cases


def _kill_some(
    root: Path,
    before: Path,
    world_size: int,
    name: str,
    victim: int,
    points: Sequence[int],
    save: Callable[[Path, int, Path, str], object],
    check: Callable[[Path, str], int],
    only: Collection[str] | None,
) -> list[Case]:
    works = [root / f"{name}_{victim}_{point}" for point in points]
    pids = []
    for point, work in zip(points, works, strict=True):
        work.mkdir()
        shutil.copytree(before, work / "folder")
        pids += [
            fork(_save, save, work, rank, name, (point, only) if rank == victim else None) for rank in range(world_size)
        ]
    ends = ends_of(pids)
    killed = []
    for index, (point, work) in enumerate(zip(points, works, strict=True)):
        mine = ends[index * world_size : (index + 1) * world_size]
        if mine[victim] == 0:
            assert mine == [0] * world_size, f"nobody was killed, and ranks ended with {mine}"
            break
        assert mine[victim] == -signal.SIGKILL, f"rank {victim} at {point} ended with {mine[victim]}"
        # The others hear of it where they wait for the victim; they may have ended before.
        assert all(end in (0, 1) for rank, end in enumerate(mine) if rank != victim), mine
        killed.append((point, work))
    looks = [fork(_look, check, work, name) for _, work in killed]
    found = []
    for (point, work), end in zip(killed, ends_of(looks), strict=True):
        operation = (work / "operation").read_text()
        assert end == 0, f"rank {victim} killed before operation {point}, {operation}, of {name!r}"
        found.append(Case(name, victim, point, operation, json.loads((work / "found").read_text())))
    for work in works:
        shutil.rmtree(work)
    return found


_ready: Callable[[], None] | None = None


def ready() -> None:
    """Say, from within a ``save`` of :func:`kill_everywhere`, that operations count from here on."""
    global _ready
    if _ready is not None:
        begin, _ready = _ready, None
        begin()


def _save(
    save: Callable[[Path, int, Path, str], object],
    work: Path,
    rank: int,
    name: str,
    kill: tuple[int, Collection[str] | None] | None,
) -> None:
    global _ready
    if kill is not None:
        point, only = kill
        _ready = lambda: die_at(point=point, only=only, note=work / "operation")  # noqa: E731
    save(work / "folder", rank, work / "store", name)


def _look(check: Callable[[Path, str], int], work: Path, name: str) -> None:
    (work / "found").write_text(json.dumps(check(work / "folder", name)))


def run_script(file: str, *arguments: object, timeout_s: float = 250.0) -> list[dict[str, Any]]:
    """Run a test's file as a script in a process of its own and return the JSON of the last line it prints."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONDONTWRITEBYTECODE": "1",  # files of the interpreter's own would be counted
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, file, *map(str, arguments)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            # With it go the processes it forked, which are in its session.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err[-6000:]
    found: list[dict[str, Any]] = json.loads(out.splitlines()[-1])
    return found


def as_json(cases: Sequence[Case]) -> str:
    """Return ``cases`` as :func:`run_script` takes them."""
    return json.dumps([asdict(case) for case in cases])
