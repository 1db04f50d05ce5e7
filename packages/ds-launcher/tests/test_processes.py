from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from ds_launcher import processes


@pytest.fixture
def sleeper():
    """A process in a session of its own that carries a job's mark."""
    command = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]
    env = {**os.environ, processes.MARK: "job-under-test"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout.readline() == b"up\n"
        yield process
        process.kill()


def test_marked_processes_are_found_and_ended(sleeper):
    assert [process.pid for process in processes.marked("job-under-test")] == [sleeper.pid]
    assert processes.marked("another job") == []
    assert processes.end_marked("job-under-test") == []
    assert not psutil.pid_exists(sleeper.pid)


def test_descendants_leave_zombies_out(sleeper):
    assert sleeper.pid in [process.pid for process in processes.descendants()]
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert sleeper.pid not in [process.pid for process in processes.descendants()]
    assert sleeper.pid in [process.pid for process in processes.children()]


def test_signals_to_processes_that_are_gone_are_nothing(sleeper):
    found = processes.marked("job-under-test")
    sleeper.kill()
    sleeper.wait()
    processes.send(found, signal.SIGTERM)


def test_signal_names():
    assert processes.signal_name(signal.SIGSEGV) == "SIGSEGV"
    assert processes.signal_name(50) == "signal 50"
