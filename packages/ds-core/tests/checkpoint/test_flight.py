"""A save in the background: its thread, its end, and the end of the program."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import warnings
from typing import TYPE_CHECKING

import pytest

from ds_core.checkpoint import flight as module
from ds_core.checkpoint.flight import Flight
from ds_core.comm import groups as comm_groups
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


def flight_of(work, directory="runs", **options):
    return Flight(work, directory=directory, label="checkpoint 'tag' in runs", total_bytes=8, speaks=False, **options)


@pytest.fixture(autouse=True)
def _nothing_untold():
    yield
    module.forget()


def test_work_runs_in_another_thread_and_counts() -> None:
    threads = []

    def work(count):
        threads.append(threading.current_thread())
        count(3)
        count(5)

    flight = flight_of(work)
    flight.start()
    flight.wait()
    assert threads[0] is not threading.current_thread()
    assert not threads[0].daemon
    assert (flight.failure, flight.written_bytes) == (None, 8)
    assert module._untold == []


def test_a_failure_stays_until_it_is_told() -> None:
    def work(count):
        raise CheckpointError("the disk is full")

    flight = flight_of(work)
    flight.start()
    flight.wait()
    assert str(flight.failure) == "the disk is full"
    assert module._untold == [flight]
    flight.told()
    flight.told()
    assert module._untold == []


def test_whatever_is_raised_is_a_failure_with_its_cause() -> None:
    def work(count):
        raise MemoryError("no more")

    flight = flight_of(work)
    flight.start()
    flight.wait()
    assert flight.failure.what == "the checkpoint was not saved: MemoryError: no more"
    assert isinstance(flight.failure.__cause__, MemoryError)


def test_saves_into_one_directory_follow_each_other(tmp_path: Path) -> None:
    """In the order they were started, however the directory is spelt; others do not wait for them."""
    gate, seen = threading.Event(), []
    (tmp_path / "link").symlink_to(tmp_path / "runs")

    def first(count):
        assert gate.wait(60)
        seen.append("first")

    def other(count):
        seen.append("other")
        gate.set()

    flights = [
        flight_of(first, tmp_path / "runs"),
        flight_of(lambda count: seen.append("second"), str(tmp_path / "link")),
        flight_of(other, tmp_path / "others"),
    ]
    for flight in flights:
        flight.start()
    for flight in flights:
        flight.wait()
        assert flight.failure is None
    assert seen == ["other", "first", "second"]


def no_thread(*args: object) -> None:
    raise RuntimeError("can't start new thread")


def test_a_thread_that_cannot_start_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    flight = flight_of(lambda count: seen.append("never"), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(CheckpointError, match="cannot be started: can't start new thread") as caught:
            flight.start()
    assert caught.value.where == "checkpoint 'tag' in runs"
    assert flight not in comm_groups._unfinished
    assert not module._lanes
    flight.cancel()
    after = flight_of(lambda count: seen.append("after"), tmp_path)
    after.start()
    after.wait()
    assert seen == ["after"], "it waits for none that never ran"


def test_a_watch_that_cannot_start_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    start = threading.Thread.start
    monkeypatch.setattr(
        threading.Thread, "start", lambda thread: no_thread() if "watch" in thread.name else start(thread)
    )
    flight = Flight(
        lambda count: seen.append("saved"), directory="runs", label="checkpoint", total_bytes=8, speaks=True
    )
    flight.start()
    flight.wait()
    assert (flight.failure, seen) == (None, ["saved"])


def test_a_cancelled_one_does_nothing(tmp_path: Path) -> None:
    seen: list[str] = []
    flight = flight_of(lambda count: seen.append("never"), tmp_path)
    flight.prepare()
    assert not module._lanes
    flight.cancel()
    flight.wait()
    assert (flight.failure, seen, module._untold) == (None, [], [])


def test_a_fork_does_not_say_that_it_is_saved() -> None:
    gate = threading.Event()
    flight = flight_of(lambda count: gate.wait(60))
    flight.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
        pid = os.fork()
    if pid == 0:
        try:
            flight.wait()
            os._exit(0 if "is a fork" in str(flight.failure) else 1)
        finally:
            os._exit(2)
    gate.set()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    flight.wait()
    assert flight.failure is None


SCRIPT = """
import logging, sys, threading
from ds_core.checkpoint import flight
from ds_core.errors import CheckpointError

flight._LOOK_S = flight._REDRAW_S = 0.01
seen = threading.Event()

class Handler(logging.StreamHandler):
    def emit(self, record):
        super().emit(record)
        seen.set()

logging.getLogger("ds_core").addHandler(Handler(sys.stderr))

def work(count):
    count(1_000_000)
    if "wait" in sys.argv:
        # Until the line about the end of the script was seen: so it does end before its save.
        assert seen.wait(60)
    if "fail" in sys.argv:
        raise CheckpointError("the disk is full", where="runs", fix="free some")
    print("saved", flush=True)

one = flight.Flight(work, directory="runs", label="checkpoint 'tag' in runs", total_bytes=4_000_000, speaks=True)
one.start()
if "told" in sys.argv:
    one.wait()
    one.told()
print("the script has ended", flush=True)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_end_of_a_script_waits_and_says_so() -> None:
    done = run("wait")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the script has ended\nsaved\n"
    assert done.stderr == ("the script has ended, still saving checkpoint 'tag' in runs: 1.0 of 4.0 MB written\n")


def test_a_save_that_is_soon_over_says_nothing() -> None:
    done = run("told")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "saved\nthe script has ended\n"


def test_a_script_whose_save_failed_does_not_end_well() -> None:
    done = run("fail")
    assert done.returncode == 1
    assert done.stdout == "the script has ended\n"
    assert done.stderr == (
        "checkpoint 'tag' in runs was not saved: the disk is full\n  where: runs\n  fix: free some\n"
    )


def test_a_script_that_was_told_ends_as_it_likes() -> None:
    done = run("fail", "told")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "the script has ended\n"


BAR = """
import sys, threading
from ds_core.checkpoint import flight
import rich.progress

flight._LOOK_S = flight._REDRAW_S = 0.01
drawn = threading.Event()
refresh = rich.progress.Progress.refresh

def seen(self):
    refresh(self)
    drawn.set()

rich.progress.Progress.refresh = seen

def work(count):
    count(1_000_000)
    assert drawn.wait(60)
    count(3_000_000)

one = flight.Flight(work, directory="runs", label="checkpoint 'tag' in runs", total_bytes=4_000_000, speaks=True)
one.start()
"""


def test_a_terminal_gets_a_bar() -> None:
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen([sys.executable, "-c", BAR], stderr=slave, env=environment) as process:
        os.close(slave)
        said = b""
        while True:
            try:
                data = os.read(master, 4096)
            except OSError:  # how Linux says that nobody has the terminal open any more
                break
            if not data:
                break
            said += data
        assert process.wait(60) == 0, said.decode()
    os.close(master)
    assert b"saving checkpoint 'tag' in runs" in said
    assert b"4.0/4.0 MB" in said
