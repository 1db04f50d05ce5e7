"""The agent: one small process per host that is the parent of its ranks and answers for everything they start.

It reads an :class:`~ds_launcher.spec.AgentSpec` from standard input, which stays open as its lifeline: further
lines are signals for the job, end of file means that the launcher is gone (killed, or its connection lost) and the
job must end.
Why it is a process of its own is written in docs/design/launcher.md.
"""

from __future__ import annotations

import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from ds_launcher import oom, processes
from ds_launcher.output import Log, Sink, Source, Tail
from ds_launcher.rank import Rank, first_failed, rank_command, rank_environment
from ds_launcher.spec import AgentReport, AgentSpec, RankFailure, encode

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Agent", "main"]

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SETTLE_S = 1.0
"""How long ranks that have printed a traceback may take to exit by themselves after another one failed."""
LOST_GRACE_S = 3.0
"""Grace when the launcher is gone: nobody waits for a save any more, and everything must end soon."""
AGAIN_S = 1.0
"""A second signal this much later means: kill now."""
KILL_S = 5.0
"""How long SIGKILL may take before a process counts as stuck in the kernel."""


class Phase(Enum):
    """Where the job stands; it only moves down this list."""

    RUNNING = 1
    SETTLING = 2
    """A rank failed; others that are failing too may still exit by themselves."""
    ENDING = 3
    """The ranks were asked to end; at the deadline everything is killed."""
    LEFTOVERS = 4
    """All ranks are gone; what they left running was asked to end."""
    KILLING = 5
    GONE = 6


@dataclass
class Agent:
    """Starts the ranks of one host, passes on their output, and ends them all when the job ends, however it does."""

    spec: AgentSpec
    control_fd: int = 0
    stdout_fd: int = 1
    stderr_fd: int = 2
    ranks: list[Rank] = field(default_factory=list)
    phase: Phase = Phase.RUNNING
    signal: int | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        self.host = socket.gethostname()
        self.is_subreaper = processes.become_subreaper()
        # Events come in the order the kernel saw them (epoll): that is how we know which rank died first.
        self.selector = selectors.DefaultSelector()
        self.stdout = Sink(self.stdout_fd, self.selector)
        self.stderr = Sink(self.stderr_fd, self.selector)
        self.sources: list[Source] = []
        self._ticks = itertools.count(1)
        self._oom_before = oom.read_counters()
        self._drop_output = False
        self._escalation_at: float | None = None
        self._signalled_at: float | None = None

    # -- start ---------------------------------------------------------------------------------------------------

    def run(self) -> AgentReport:
        """Run the job to its end. Afterwards no process of it is left here."""
        self._catch_signals()
        os.set_blocking(self.control_fd, False)
        self.selector.register(self.control_fd, selectors.EVENT_READ, self._read_control)
        error = self._start_ranks()
        if error is not None:
            self._end(signal.SIGTERM)
        survivors = self._supervise()
        self._pass_on_the_rest()
        failure = None if error is not None else self._failure()
        return AgentReport(
            failure=failure,
            signal=self.signal if failure is None else None,
            error=error,
            survivors=survivors,
        )

    def _catch_signals(self) -> None:
        read, write = os.pipe()
        for fd in (read, write):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, *FORWARDED):
            # The handler does nothing: the number arrives through the wakeup pipe, in the loop.
            signal.signal(number, lambda *_: None)
        self.selector.register(read, selectors.EVENT_READ, lambda: self._read_signals(read))

    def _start_ranks(self) -> str | None:
        """Start every rank; return what went wrong, if anything did."""
        for local_rank in range(self.spec.nproc):
            try:
                self.ranks.append(self._start(local_rank))
            except OSError as error:
                return f"rank {self.spec.first_rank + local_rank} cannot be started: {error}"
        return None

    def _start(self, local_rank: int) -> Rank:
        spec = self.spec
        rank = spec.first_rank + local_rank
        log = Log(str(Path(spec.log_dir) / f"rank_{rank}.log")) if spec.log_dir else None
        # Rank 0 of the job writes to the terminal itself, so that progress bars see one.
        inherits_stdout = rank == 0 and log is None
        popen = subprocess.Popen(
            rank_command(spec, local_rank),
            env={**os.environ, **rank_environment(spec, local_rank)},
            stdin=spec.stdin_fd if rank == 0 and spec.stdin_fd is not None else subprocess.DEVNULL,
            stdout=self.stdout_fd if inherits_stdout else subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            preexec_fn=processes.die_with_parent(),  # safe: this process has one thread
        )
        tail = Tail(lambda: next(self._ticks))
        prefix = b"" if rank == 0 else f"[rank {rank}] ".encode()
        for pipe, sink, its_tail in ((popen.stdout, self.stdout, None), (popen.stderr, self.stderr, tail)):
            if pipe is not None:
                fd = os.dup(pipe.fileno())
                pipe.close()
                source = Source(fd, sink, self.selector, prefix=prefix, tail=its_tail, log=log)
                source.listen(True)
                self.sources.append(source)
        entry = Rank(rank, local_rank, popen, tail, log)
        if hasattr(os, "pidfd_open"):
            with suppress(OSError):  # a kernel before 5.3: SIGCHLD alone tells
                entry.pidfd = os.pidfd_open(popen.pid)
                self.selector.register(entry.pidfd, selectors.EVENT_READ, lambda: self._reap_rank(entry))
        return entry

    # -- loop ----------------------------------------------------------------------------------------------------

    def _supervise(self) -> list[int]:
        while self.phase is not Phase.GONE:
            self._wait()
            survivors = self._advance()
            if survivors:
                return survivors
        return []

    def _wait(self) -> None:
        """Handle what happens until the next deadline."""
        times = [moment for moment in (self.deadline, self._escalation_at) if moment is not None]
        timeout = max(0.0, min(times) - time.monotonic()) if times else None
        if self.phase.value >= Phase.LEFTOVERS.value and not self.is_subreaper:
            # Without a subreaper nobody tells us when a grandchild ends: look again now and then.
            timeout = min(0.1, timeout or 0.1)
        for source in self.sources:
            source.listen(not source.sink.is_full)
        self._handle(timeout)

    def _handle(self, timeout: float | None) -> None:
        for key, _ in self.selector.select(timeout):
            handler: Callable[[], object] = key.data
            handler()

    def _advance(self) -> list[int]:
        """Move on to the next phase when it is time; return the processes that cannot be ended, if there are any."""
        running = [rank for rank in self.ranks if rank.status is None]
        if self._escalation_at is not None and time.monotonic() >= self._escalation_at:
            self._escalation_at = None
            self._ask_ranks(signal.SIGTERM)
        if self.phase is Phase.RUNNING and any(rank.status for rank in self.ranks):
            if any(rank.tail.traceback_tick is not None for rank in running):
                self._enter(Phase.SETTLING, SETTLE_S)
            else:
                self._end(signal.SIGTERM)
        if self.phase is Phase.SETTLING and (self._is_expired() or not running):
            self._end(signal.SIGTERM)
        if self.phase in (Phase.RUNNING, Phase.ENDING) and not running:
            self._enter(Phase.LEFTOVERS, None if self.phase is Phase.ENDING else self.spec.grace_s)
            processes.send(self._others(), signal.SIGTERM)
        if self.phase in (Phase.ENDING, Phase.LEFTOVERS) and self._is_expired():
            self._kill()
        elif self.phase is Phase.KILLING:
            others = self._others()
            if self._is_expired():
                return [*(rank.popen.pid for rank in running), *(process.pid for process in others)]
            processes.send(others, signal.SIGKILL)  # again: one may have forked before it died
        if self.phase in (Phase.LEFTOVERS, Phase.KILLING) and not running and self._all_gone():
            self.phase = Phase.GONE
        return []

    def _is_expired(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _enter(self, phase: Phase, seconds: float | None) -> None:
        """Begin ``phase``, with a deadline in ``seconds``; None keeps the deadline that is set."""
        self.phase = phase
        if seconds is not None:
            self.deadline = time.monotonic() + seconds

    def _end(self, number: int, *, grace_s: float | None = None) -> None:
        """Ask every rank to end. Only the ranks: a data worker that dies first would break its rank's last save."""
        if self.phase.value >= Phase.ENDING.value:
            return
        grace = self.spec.grace_s if grace_s is None else grace_s
        self._enter(Phase.ENDING, grace)
        self._ask_ranks(number)
        if number == signal.SIGINT:
            # KeyboardInterrupt waits for Python code to run; a rank inside a collective only hears SIGTERM.
            self._escalation_at = time.monotonic() + grace / 2

    def _ask_ranks(self, number: int) -> None:
        for rank in self.ranks:
            if rank.status is None:
                rank.was_asked = True
                os.kill(rank.popen.pid, number)  # not reaped yet, so the pid is still its own

    def _kill(self) -> None:
        self._enter(Phase.KILLING, KILL_S)
        self._escalation_at = None
        self._ask_ranks(signal.SIGKILL)
        processes.send(self._others(), signal.SIGKILL)

    # -- events --------------------------------------------------------------------------------------------------

    def _read_signals(self, fd: int) -> None:
        with suppress(BlockingIOError):
            for number in os.read(fd, 4096):
                if number == signal.SIGCHLD:
                    self._reap()
                else:
                    self._signalled(number)

    def _read_control(self) -> None:
        try:
            data = os.read(self.control_fd, 4096)
        except BlockingIOError:
            return
        if not data:
            self.selector.unregister(self.control_fd)
            self._drop_output = True
            self.stderr.put(b"ds run: the launcher is gone, ending all ranks\n")
            self.deadline = min(self.deadline or float("inf"), time.monotonic() + LOST_GRACE_S)
            self._end(signal.SIGTERM, grace_s=min(self.spec.grace_s, LOST_GRACE_S))
            return
        for word in data.split():
            self._signalled(int(word))

    def _signalled(self, number: int) -> None:
        """Someone wants the job to end; whoever asks again does not want to wait."""
        now = time.monotonic()
        # `timeout` and some schedulers send the same signal to the process and to its group: that is asking once.
        asks_again = self._signalled_at is not None and now - self._signalled_at > AGAIN_S
        self._signalled_at = self._signalled_at or now
        if asks_again and self.phase in (Phase.ENDING, Phase.LEFTOVERS):
            self._kill()
        if self.phase is Phase.GONE:
            self._drop_output = True  # only a blocked terminal keeps us now
        if self.signal is None and not any(rank.status for rank in self.ranks):
            self.signal = number
        # SIGHUP says that the terminal is gone; what programs handle to save and stop is SIGTERM.
        self._end(signal.SIGTERM if number == signal.SIGHUP else number)

    def _reap_rank(self, rank: Rank) -> None:
        if rank.status is not None:
            return
        pid, status = os.waitpid(rank.popen.pid, os.WNOHANG)
        if pid == 0:
            return
        rank.status = rank.popen.returncode = os.waitstatus_to_exitcode(status)
        rank.ended_tick = next(self._ticks)
        if rank.pidfd is not None:
            self.selector.unregister(rank.pidfd)
            os.close(rank.pidfd)
            rank.pidfd = None

    def _reap(self) -> None:
        """Collect orphans that became ours. Ranks with a pidfd are left alone: their events carry the order."""
        mine = {rank.popen.pid: rank for rank in self.ranks if rank.status is None}
        for rank in mine.values():
            if rank.pidfd is None:
                self._reap_rank(rank)
        if not self.is_subreaper:
            return
        for process in processes.children():
            if process.pid not in mine:
                with suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)

    def _others(self) -> list[processes.Process]:
        """Living processes of the job, apart from ranks that are still to be reaped."""
        mine = {rank.popen.pid for rank in self.ranks if rank.status is None}
        found = {process.pid: process for process in processes.descendants()}
        if not self.is_subreaper:
            found.update({process.pid: process for process in processes.marked(self.spec.job_id)})
        return [process for pid, process in found.items() if pid not in mine]

    def _all_gone(self) -> bool:
        self._reap()
        return not self._others()

    # -- end -----------------------------------------------------------------------------------------------------

    def _pass_on_the_rest(self) -> None:
        """Everything has ended: empty the pipes, then the sinks, unless nobody is there to read them."""
        for source in self.sources:
            source.drain()
        for rank in self.ranks:
            if rank.log is not None:
                rank.log.close()
                if rank.log.problem:
                    self.stderr.put(f"ds run: {rank.log.problem}\n".encode(errors="backslashreplace"))
        while not (self._drop_output or (self.stdout.is_empty and self.stderr.is_empty)):
            self._handle(None)

    def _failure(self) -> RankFailure | None:
        """Return the failure that came first, or None; ranks that ended because we asked them have not failed."""
        first = first_failed(self.ranks)
        if first is None or first.status is None or self.signal is not None:
            return None
        lines, is_traceback = first.tail.excerpt()
        return RankFailure(
            rank=first.rank,
            host=self.host,
            pid=first.popen.pid,
            status=first.status,
            stderr_lines=lines,
            is_traceback=is_traceback,
            out_of_memory=oom.explain(self._oom_before, oom.read_counters()) if first.status == -9 else None,
            log=first.log.path if first.log else None,
        )


def main() -> None:
    """Read the job from standard input, run it, report."""
    text = bytearray()
    # Byte by byte, so that nothing after the first line is taken: that belongs to the control channel.
    while not text.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit("ds-launcher agent: the job did not arrive")
        text += byte
    spec = AgentSpec(**json.loads(text))
    os.set_inheritable(spec.report_fd, False)
    report = encode(Agent(spec).run())
    with suppress(BrokenPipeError), os.fdopen(spec.report_fd, "wb") as out:
        out.write(report)


if __name__ == "__main__":
    main()
