"""Kill saves at every point: before each file operation, or when a file has reached a size."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_core.testing import crash

if TYPE_CHECKING:
    from ds_core.config import Section
    from ds_core.interfaces.checkpoint import CheckpointEngine

__all__ = ["kill_saves"]

_OPERATIONS = ("create", "sync", "rename", "remove", "mkdir", "rmdir", "truncate", "link")
"""Writes are cut by size: engines may write in thousands of pieces."""
_MAX_POINTS = 200
_SIZES = (1, 100, 5000)


def kill_saves(cls: type[CheckpointEngine], options: Section | None, directory: Path, tag: str) -> int:
    """Kill a save at every point and check each time what is left; return the number of points.

    Runs in a process of its own, which forks for each point: importing torch for each would take minutes.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    job = pickle.dumps((cls, options, str(directory), tag)).hex()
    code = "import sys; from ds_core.testing._checkpoint_crash import main; main(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, job], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return int(done.stdout.split()[-1])


def main(job: str) -> None:
    """Do the work of :func:`kill_saves`, in the process that forks."""
    from ds_core.testing.checkpoint import check_content, load_version, snapshot

    cls, options, directory, tag = pickle.loads(bytes.fromhex(job))
    engine = cls(options, None)
    root = Path(directory)
    before = root / "before"
    before.mkdir()
    engine.save(before, "same", snapshot(1), latest=True)
    engine.commit()  # a thread does not go with a fork
    killed = 0
    for nth in range(_MAX_POINTS):
        folder = _fresh(before, root / f"operation_{nth}")
        if not _killed(lambda nth=nth, folder=folder: _save(engine, folder, tag, operation=nth)):
            # All operations are behind: the save was complete.
            assert load_version(engine, folder, [2]) == 2
            break
        killed += 1
        load_version(engine, folder, [1, 2])
        # What the crash left must not be in the way of the next save.
        engine.save(folder, tag, snapshot(3), latest=True)
        engine.commit()
        check_content(engine, folder, tag, 3)
    else:
        raise AssertionError(f"a save of more than {_MAX_POINTS} file operations")
    for size in _SIZES:
        folder = _fresh(before, root / f"size_{size}")
        if _killed(lambda size=size, folder=folder: _save(engine, folder, tag, size=size)):
            killed += 1
            load_version(engine, folder, [1])
    print(killed)


def _fresh(before: Path, folder: Path) -> Path:
    shutil.copytree(before, folder)
    return folder


def _save(
    engine: CheckpointEngine, folder: Path, tag: str, *, operation: int | None = None, size: int | None = None
) -> None:
    from ds_core.testing.checkpoint import snapshot

    given = snapshot(2)
    if operation is not None:
        crash.die_at(point=operation, only=_OPERATIONS)
    if size is not None:
        # Python ignores this signal at its start; its default is to end the process in the midst of the write.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    with nullcontext() if size is None else crash.limited_file_size(size):
        engine.save(folder, tag, given, latest=True)
        engine.commit()


def _killed(save: Any) -> bool:
    """Run ``save`` in a fork; return whether a signal ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            save()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status <= 0, "the save raised; see above"
    return status < 0
