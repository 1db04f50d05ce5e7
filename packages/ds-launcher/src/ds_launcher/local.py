"""The ``local`` runner: all ranks on this machine, under one agent."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ds_core.errors import LaunchError
from ds_core.interfaces.runner import Job, Runner
from ds_launcher import failure, processes, resources
from ds_launcher.spec import GRACE_S, AgentReport, AgentSpec, encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["LocalRunner"]

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if hasattr(signal, "SIGHUP") else ()

# Isolated, so that neither the current folder nor PYTHON* variables can shadow what the agent imports; the folders of
# this process are added, so that ds_launcher is found wherever it was found here.
_AGENT = """
import json, sys
sys.path += [path for path in json.loads(sys.argv[1]) if path not in sys.path]
from ds_launcher.agent import main
main()
"""


class LocalRunner(Runner):
    """Starts the ranks of a job on this machine.

    Args:
        grace_s: seconds between asking a rank to end and killing it.
        log_dir: folder for a copy of each rank's output, ``rank_<k>.log``; created if missing, logs are appended to.
        local_rank_at: place in the command to insert ``--local_rank=K``, or None.
    """

    def __init__(
        self, *, grace_s: float = GRACE_S, log_dir: str | None = None, local_rank_at: int | None = None
    ) -> None:
        self.grace_s, self.log_dir, self.local_rank_at = grace_s, log_dir, local_rank_at

    def problem(self) -> str | None:
        return None if os.name == "posix" else f"the local runner needs POSIX signals and pipes, this is {os.name!r}"

    def commands(self, job: Job) -> Mapping[str, Sequence[str]]:
        last = job.nproc - 1
        ranks = "0" if last == 0 else f"0..{last}"
        command = list(job.command)
        if self.local_rank_at is not None:
            command.insert(self.local_rank_at, f"--local_rank={ranks}")
        shown = {
            **_defaults(job),
            "MASTER_ADDR": job.master_addr,
            "MASTER_PORT": "<free port>" if job.master_port is None else str(job.master_port),
            "WORLD_SIZE": str(job.nproc),
            "LOCAL_WORLD_SIZE": str(job.nproc),
            "RANK": ranks,
            "LOCAL_RANK": ranks,
        }
        return {socket.gethostname(): ["env", *(f"{key}={value}" for key, value in shown.items()), *command]}

    def run(self, job: Job) -> int:
        spec = self._spec(job)
        agent_gone, report_fd = os.pipe()
        stdin_fd = _duplicate_stdin()
        with _forwarded_signals() as wakeup_fd:
            try:
                agent = _start_agent(spec, report_fd, stdin_fd)
            finally:
                os.close(report_fd)
                if stdin_fd is not None:
                    os.close(stdin_fd)
            with agent, os.fdopen(agent_gone, "rb") as reports:
                text = _attend(agent, reports.fileno(), wakeup_fd)
                status = agent.wait()
        if not text:
            return _agent_lost(spec.job_id, status)
        return self._conclude(AgentReport.decode(text))

    def _spec(self, job: Job) -> AgentSpec:
        problem = self.problem()
        if problem is not None:
            raise LaunchError(problem, fix="run under Linux or macOS, or WSL on Windows")
        if job.nproc < 1:
            raise LaunchError(f"nproc is {job.nproc}, the least is 1", where="Job.nproc", fix="start at least one rank")
        if job.master_port is not None:
            resources.check_port(job.master_port)
        return AgentSpec(
            command=list(job.command),
            job_id=uuid.uuid4().hex,
            nproc=job.nproc,
            world_size=job.nproc,
            master_addr=job.master_addr,
            master_port=resources.find_free_port() if job.master_port is None else job.master_port,
            env=_defaults(job),
            grace_s=self.grace_s,
            local_rank_at=self.local_rank_at,
            log_dir=_made(self.log_dir),
        )

    def _conclude(self, report: AgentReport) -> int:
        """Print what must be read last and return the exit code."""
        if report.survivors:
            pids = ", ".join(map(str, report.survivors))
            print(f"ds run: processes that even SIGKILL did not end: {pids}", file=sys.stderr)
        if report.error is not None:
            raise LaunchError(report.error, fix="check that the program exists and may be executed")
        if report.failure is not None:
            print(failure.describe(report.failure), file=sys.stderr, flush=True)
            return report.failure.exit_code
        if report.signal is not None:
            print(f"ds run: ended by {processes.signal_name(report.signal)}", file=sys.stderr, flush=True)
            return 128 + report.signal
        return 0


def _defaults(job: Job) -> dict[str, str]:
    """Variables set for every rank unless the user has set them."""
    # Without a limit every rank starts one thread per core, and they get in each other's way.
    threads = str(max(1, resources.cores() // job.nproc))
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), "PYTHONUNBUFFERED": "1", **job.env}


def _made(log_dir: str | None) -> str | None:
    if log_dir is None:
        return None
    try:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"{log_dir!r} cannot be made a folder: {error.strerror}", where="--log-dir", fix="name a folder to write to"
        ) from error
    return str(Path(log_dir).resolve())


def _duplicate_stdin() -> int | None:
    try:
        return os.dup(0)
    except OSError:  # a launcher started without standard input
        return None


def _start_agent(spec: AgentSpec, report_fd: int, stdin_fd: int | None) -> subprocess.Popen[bytes]:
    passed = tuple(fd for fd in (report_fd, stdin_fd) if fd is not None)
    agent = subprocess.Popen(
        [sys.executable, "-I", "-c", _AGENT, json.dumps([str(Path(path).absolute()) for path in sys.path if path])],
        stdin=subprocess.PIPE,
        pass_fds=passed,
        bufsize=0,
        # Its own session: Ctrl-C and a kill of our process group must not reach it, it has work to do then.
        start_new_session=True,
    )
    assert agent.stdin is not None
    message = encode(AgentSpec(**{**vars(spec), "report_fd": report_fd, "stdin_fd": stdin_fd}))
    with suppress(BrokenPipeError):  # it died already; the missing report says so
        agent.stdin.write(message)
    return agent


def _attend(agent: subprocess.Popen[bytes], report_fd: int, wakeup_fd: int | None) -> bytes:
    """Forward signals until the agent has written its report and closed the pipe."""
    assert agent.stdin is not None
    text = b""
    with selectors.DefaultSelector() as selector:
        selector.register(report_fd, selectors.EVENT_READ)
        if wakeup_fd is not None:
            selector.register(wakeup_fd, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                data = os.read(key.fd, 1 << 16)
                if key.fd == report_fd:
                    if not data:
                        return text
                    text += data
                    continue
                for number in data:
                    if number in FORWARDED:
                        with suppress(BrokenPipeError):  # it is ending; its report comes
                            agent.stdin.write(b"%d\n" % number)


@contextmanager
def _forwarded_signals() -> Iterator[int | None]:
    """Catch the signals that end a job; yields a descriptor to read their numbers from.

    Outside the main thread Python cannot catch signals: None is yielded, and the caller's own handling stays.
    """
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    # A signal that is ignored already stays so: that is what nohup asks for.
    numbers = [number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)


def _agent_lost(job_id: str, status: int) -> int:
    """The agent died without a report: its ranks died with it, what they had started is found by its mark."""
    left = processes.end_marked(job_id)
    print(
        f"ds run: the agent on host {socket.gethostname()} ended without a report "
        f"({failure.describe_status(status)}); all ranks were ended"
        + (f", except {', '.join(map(str, left))}" if left else ""),
        file=sys.stderr,
        flush=True,
    )
    return status if status > 0 else 128 - status if status else 1
