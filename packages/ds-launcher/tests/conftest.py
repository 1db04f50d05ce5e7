"""Starts real jobs through ``ds run`` and finds every process that belongs to them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DS = [sys.executable, "-c", "from ds_core.cli import cli_main; cli_main()"]
WAITS = "import os, signal; os.write(1, b'ready' + os.linesep.encode()); signal.pause()"
"""Code of a child that says when it is there, and waits."""
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAITS}"
"""The same, but SIGTERM does not end it."""
HEAD = f"""
waits, deaf = {WAITS!r}, {DEAF!r}
import os, sys
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
def say(*words, fd=1):  # one write per line: an unbuffered print makes two, and another rank's line may come between
    os.write(fd, (" ".join(map(str, words)) + "\\n").encode())
"""
GONE_S = 10.0
"""Within this time after the end of a job none of its processes may exist (promise P06)."""
TIMEOUT_S = 30.0


@dataclass
class Result:
    code: int
    out: bytes
    err: bytes

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def error(self) -> str:
        return self.err.decode()


@dataclass
class Started:
    """A job that runs."""

    popen: subprocess.Popen[bytes]
    mark: str
    seen: list[str] = field(default_factory=list)

    def processes(self) -> list[psutil.Process]:
        """Everything that was started by this job, wherever it went; found without the launcher's own mark."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("TEST_JOB") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def lines(self, count: int) -> list[str]:
        """Read the next ``count`` lines of its output."""
        assert self.popen.stdout is not None
        lines = [self.popen.stdout.readline().decode().rstrip("\n") for _ in range(count)]
        self.seen += lines
        assert all(lines), f"the job ended early: {self.seen}"
        return lines

    def finish(self) -> Result:
        """Wait for its end and check that nothing of it is left."""
        out, err = self.popen.communicate(timeout=TIMEOUT_S)
        self.assert_gone()
        return Result(self.popen.returncode, out, err)

    def assert_gone(self) -> None:
        _, alive = psutil.wait_procs(self.processes(), timeout=GONE_S)
        assert not alive
        assert not self.processes()


class Jobs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Started] = []

    def script(self, text: str, name: str = "script.py") -> str:
        """Write a rank's program; :data:`HEAD` stands before it."""
        path = self.folder / name
        path.write_text(HEAD + textwrap.dedent(text))
        return str(path)

    def start(self, text: str, *flags: str, args: tuple[str | bytes, ...] = (), **popen: object) -> Started:
        """Start ``ds run flags script args`` with a script of this text."""
        return self.start_command("run", *flags, self.script(text), *args, **popen)

    def start_command(self, *command: str | bytes, **popen: object) -> Started:
        mark = uuid.uuid4().hex
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **popen}
        env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MASTER_PORT")}
        env |= {"TEST_JOB": mark, **options.pop("env", {})}
        job = Started(subprocess.Popen([*DS, *command], env=env, cwd=self.folder, **options), mark)
        self.started.append(job)
        return job

    def run(self, text: str, *flags: str, args: tuple[str | bytes, ...] = (), **popen: object) -> Result:
        return self.start(text, *flags, args=args, **popen).finish()

    def end(self) -> None:
        for job in self.started:
            for process in job.processes():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            job.popen.wait(timeout=TIMEOUT_S)
            for pipe in (job.popen.stdin, job.popen.stdout, job.popen.stderr):
                if pipe is not None:
                    pipe.close()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """Starts jobs in an empty folder; kills what a failed test leaves."""
    jobs = Jobs(tmp_path)
    yield jobs
    jobs.end()


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Wait for a condition that no descriptor tells about, such as a process's state."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, "the condition was never met"
            time.sleep(0.005)

    return wait
