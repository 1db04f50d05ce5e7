"""A rank fails: the others end, the first failure is named, its traceback comes last, the exit code is its own."""

from __future__ import annotations

import os
import signal
import socket

import psutil
import pytest

HOST = socket.gethostname()
WAIT = "import signal\nsay('ready', os.getpid())\nsignal.pause()\n"


def last_block(error: str) -> list[str]:
    """The lines from the launcher's verdict to the end."""
    lines = error.rstrip("\n").split("\n")
    start = next(index for index, line in enumerate(lines) if line.startswith("ds run: "))
    return lines[start:]


def pids_of_ranks(job, world: int) -> dict[int, int]:
    """Rank -> pid, for scripts that begin with WAIT."""
    pids = {}
    for line in job.lines(world):
        rank = int(line.split("]")[0].removeprefix("[rank ")) if line.startswith("[") else 0
        pids[rank] = int(line.split()[-1])
    return pids


@pytest.mark.parametrize("failing", [0, 1])
def test_traceback_comes_last_after_the_others_ended(jobs, failing):
    text = f"""
        import signal
        if rank == {failing}:
            raise ValueError("boom")
        def stop(number, frame):
            say("asked to end", fd=2)
            sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        signal.pause()
    """
    result = jobs.run(text, "--nproc", "2")
    assert result.code == 1
    block = last_block(result.error)
    assert block[0] == f"ds run: rank {failing} on host {HOST} failed first: exit code 1"
    assert block[1] == f"  traceback of rank {failing}:"
    assert block[2] == "    Traceback (most recent call last):"
    assert block[-1] == "    ValueError: boom"


def test_chained_tracebacks_are_shown_whole(jobs):
    text = """
        print("before", file=sys.stderr)
        try:
            {}["key"]
        except KeyError as error:
            raise RuntimeError("second") from error
    """
    block = last_block(jobs.run(text, "--nproc", "1").error)
    assert block[2] == "    Traceback (most recent call last):"
    assert "    KeyError: 'key'" in block
    assert block[-1] == "    RuntimeError: second"


def test_exit_code_and_last_lines_without_a_traceback(jobs):
    text = """
        for number in range(30):
            print("line", number, file=sys.stderr)
        sys.exit(3)
    """
    result = jobs.run(text, "--nproc", "1")
    assert result.code == 3
    assert last_block(result.error) == [
        f"ds run: rank 0 on host {HOST} failed first: exit code 3",
        "  last lines of its stderr (20):",
        *(f"    line {number}" for number in range(10, 30)),
    ]


def test_silent_failure_names_the_log(jobs):
    result = jobs.run("os._exit(9)", "--nproc", "1", "--log-dir", "logs")
    assert result.code == 9
    assert last_block(result.error)[1:] == [
        f"  log: {jobs.folder / 'logs' / 'rank_0.log'}",
        "  it wrote nothing to stderr",
    ]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_signals_have_names(jobs, number):
    result = jobs.run(f"os.kill(os.getpid(), {int(number)}) if rank else __import__('signal').pause()", "--nproc", "2")
    assert result.code == 128 + number
    block = last_block(result.error)
    assert block[0] == f"ds run: rank 1 on host {HOST} failed first: killed by {number.name}"
    # What the kernel says about memory belongs to SIGKILL alone.
    assert any(line.startswith("  memory: ") for line in block) == (number == signal.SIGKILL)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_rank_that_died_first_is_named_even_if_both_are_found_dead_together(jobs, until, order):
    job = jobs.start(WAIT, "--nproc", "2")
    pids = pids_of_ranks(job, 2)
    agent = psutil.Process(pids[0]).parent()
    agent.suspend()
    until(lambda: agent.status() == psutil.STATUS_STOPPED)
    for rank, number in zip(order, (signal.SIGABRT, signal.SIGKILL), strict=True):
        os.kill(pids[rank], number)
        until(lambda rank=rank: psutil.Process(pids[rank]).status() == psutil.STATUS_ZOMBIE)
    agent.resume()
    result = job.finish()
    assert result.code == 128 + signal.SIGABRT
    assert last_block(result.error)[0].endswith(f"rank {order[0]} on host {HOST} failed first: killed by SIGABRT")


def test_a_rank_that_fails_of_the_first_failure_does_not_mask_it(jobs):
    # Rank 1 raises, and takes longer to exit than rank 0 takes to die of it.
    fifo = str(jobs.folder / "fifo")
    os.mkfifo(fifo)
    text = f"""
        import atexit, select
        if rank == 1:
            with open({fifo!r}) as file:
                other = os.pidfd_open(int(file.readline()))
            def slow_exit():
                open({fifo!r}, "w").close()
                select.select([other], [], [])
            atexit.register(slow_exit)
            raise ValueError("the cause")
        with open({fifo!r}, "w") as file:
            print(os.getpid(), file=file)
        open({fifo!r}).read()
        raise ConnectionError("connection closed by peer")
    """
    result = jobs.run(text, "--nproc", "2")
    block = last_block(result.error)
    assert block[0] == f"ds run: rank 1 on host {HOST} failed first: exit code 1"
    assert block[-1] == "    ValueError: the cause"


def test_a_rank_that_does_not_end_is_killed_after_the_grace(jobs):
    text = """
        import signal
        if rank == 1:
            sys.stdin.read()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            say("deaf")
            signal.pause()
        with open(0) as go:
            go.readline()
        sys.exit(5)
    """
    read, write = os.pipe()
    try:
        job = jobs.start(text, "--nproc", "2", "--grace", "0.2", stdin=read)
        assert job.lines(1) == ["[rank 1] deaf"]
        os.write(write, b"go\n")
        assert job.finish().code == 5
    finally:
        os.close(read)
        os.close(write)


def test_what_ranks_leave_running_is_ended(jobs):
    # A daemon as daemons are made: two forks, a session of its own, nothing inherited but the environment.
    text = """
        import subprocess
        read, write = os.pipe()
        if os.fork() == 0:
            subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True, stdout=write)
            os._exit(0)
        os.wait()
        assert os.read(read, 6) == b"ready\\n"
    """
    result = jobs.run(text, "--nproc", "2", "--grace", "0.2")
    assert (result.code, result.error) == (0, "")


def test_a_program_that_cannot_be_executed(jobs):
    program = jobs.folder / "program"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    result = jobs.start_command("run", "--nproc", "2", "--no_python", str(program)).finish()
    assert result.code == 1
    assert result.error.startswith("rank 0 cannot be started: [Errno 2] No such file or directory")
    assert "Traceback" not in result.error


def test_a_rank_with_an_old_traceback_still_gets_its_grace(jobs):
    # It looks as if it were failing, so it may exit by itself for a moment; then it is asked like any other.
    text = """
        import signal, traceback
        if rank == 0:
            sys.exit(sys.stdin.read() and 6)
        def stop(number, frame):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
        def save(number, frame):
            say("saved")
            os._exit(0)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGALRM, save)
        try:
            raise ValueError("handled")
        except ValueError:
            traceback.print_exc()
        say("ready")
        while True:
            signal.pause()
    """
    read, write = os.pipe()
    job = jobs.start(text, "--nproc", "2", stdin=read)
    os.close(read)
    job.lines(1)
    os.write(write, b"go")
    os.close(write)
    result = job.finish()
    assert (result.code, result.text) == (6, "[rank 1] saved\n")
    assert last_block(result.error)[0] == f"ds run: rank 0 on host {HOST} failed first: exit code 6"
