"""Contract of the seam ``runner``; inherit :class:`RunnerContract` in a plugin's tests.

The ranks here are small Python programs without torch, which leave files behind to say what they saw.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from ds_core.errors import LaunchError
from ds_core.interfaces.runner import Job

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ds_core.interfaces.runner import Runner

__all__ = ["RunnerContract"]

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "EXTRA", "HOME")

_SEEN = """
import json, os, sys
seen = {name: os.environ.get(name) for name in %r}
open(os.path.join(sys.argv[1], "seen." + os.environ["RANK"]), "w").write(json.dumps([seen, sys.argv[2:]]))
"""
# Rank 1 ends in its own way; rank 0 would run for ever, and has a child in a session of its own.
_ONE_ENDS = """
import os, signal, subprocess, sys, time
folder, rank = sys.argv[1], os.environ["RANK"]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
with open(os.path.join(folder, "pids." + rank), "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(os.path.join(folder, "pids." + rank), os.path.join(folder, "ready." + rank))
if rank == "1":
    while not os.path.exists(os.path.join(folder, "ready.0")):
        time.sleep(0.01)
    %s
time.sleep(1000)
"""


class RunnerContract:
    """What every runner promises. Skipped where it cannot be used, with its reason."""

    @pytest.fixture
    def runner(self) -> Runner:
        """Override: the instance under test; what it starts runs on this machine."""
        raise NotImplementedError

    @pytest.fixture
    def usable(self, runner: Runner) -> Runner:
        problem = runner.problem()
        if problem is not None:
            pytest.skip(problem)
        return runner

    def test_a_problem_is_text(self, runner: Runner) -> None:
        problem = runner.problem()
        assert problem is None or problem.strip()

    def test_commands_start_nothing(self, runner: Runner, tmp_path: Path) -> None:
        before = len(psutil.Process().children(recursive=True))
        commands = runner.commands(_job(_SEEN % (VARIABLES,), tmp_path, "an argument"))
        assert commands
        for host, command in commands.items():
            assert host
            assert command
            assert all(isinstance(word, str) for word in command)
        assert any("an argument" in word for command in commands.values() for word in command)
        assert len(psutil.Process().children(recursive=True)) == before
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("nproc", [1, 3])
    def test_every_rank_knows_its_place(self, usable: Runner, tmp_path: Path, nproc: int) -> None:
        arguments = ("a b", "$HOME", "'quoted\"", "*", "")
        assert usable.run(_job(_SEEN % (VARIABLES,), tmp_path, *arguments, nproc=nproc, env={"EXTRA": "x y=z"})) == 0
        assert len(list(tmp_path.iterdir())) == nproc
        ports = set()
        for rank in range(nproc):
            seen, passed = json.loads((tmp_path / f"seen.{rank}").read_text())
            assert passed == list(arguments), "arguments arrive as they are"
            assert (seen["RANK"], seen["LOCAL_RANK"]) == (str(rank), str(rank))
            assert (seen["WORLD_SIZE"], seen["LOCAL_WORLD_SIZE"]) == (str(nproc), str(nproc))
            assert seen["MASTER_ADDR"] == "127.0.0.1"
            assert seen["EXTRA"] == "x y=z"
            assert seen["HOME"] == os.environ.get("HOME")
            ports.add(int(seen["MASTER_PORT"]))
        assert len(ports) == 1
        assert 0 < ports.pop() < 2**16

    def test_a_port_that_is_given_is_used(self, usable: Runner, tmp_path: Path) -> None:
        # Only named, never bound.
        assert usable.run(_job(_SEEN % (VARIABLES,), tmp_path, nproc=1, master_port=28461)) == 0
        assert json.loads((tmp_path / "seen.0").read_text())[0]["MASTER_PORT"] == "28461"

    @pytest.mark.parametrize(
        ("way", "code"),
        [
            ("sys.exit(3)", 3),
            ("raise ValueError('the reason')", 1),
            ("os.kill(os.getpid(), signal.SIGKILL)", 128 + 9),
            ("os.kill(os.getpid(), signal.SIGTERM)", 128 + 15),
        ],
    )
    def test_one_rank_fails(
        self, usable: Runner, tmp_path: Path, capfd: pytest.CaptureFixture[str], way: str, code: int
    ) -> None:
        """Its code is the job's, the others are ended, and no process is left, grandchildren included."""
        assert usable.run(_job(_ONE_ENDS % way, tmp_path)) == code
        pids = [int(pid) for rank in range(2) for pid in (tmp_path / f"ready.{rank}").read_text().split()]
        assert len(pids) == 4
        assert [pid for pid in pids if _is_alive(pid)] == []
        if "reason" in way:
            assert "ValueError: the reason" in "".join(capfd.readouterr().err.splitlines()[-20:])

    def test_what_cannot_be_started_is_an_error(self, usable: Runner, tmp_path: Path) -> None:
        with pytest.raises(LaunchError, match="no-such-program"):
            usable.run(Job(command=[str(tmp_path / "no-such-program")], nproc=2))
        with pytest.raises(LaunchError):
            usable.run(Job(command=[sys.executable, "-c", "pass"], nproc=0))

    def test_nothing_is_left_after_a_good_end(self, usable: Runner, tmp_path: Path) -> None:
        """A rank that ends well may forget a child."""
        code = _ONE_ENDS.replace("time.sleep(1000)\n", "") % "pass"
        assert usable.run(_job(code, tmp_path)) == 0
        pids = [int(pid) for rank in range(2) for pid in (tmp_path / f"ready.{rank}").read_text().split()]
        _wait_until(lambda: not any(map(_is_alive, pids)))

    def test_jobs_can_follow_each_other(self, usable: Runner, tmp_path: Path) -> None:
        open_before = psutil.Process().num_fds()
        for _ in range(2):
            assert usable.run(_job(_SEEN % (VARIABLES,), tmp_path)) == 0
        assert psutil.Process().num_fds() == open_before


def _job(
    code: str,
    folder: Path,
    *arguments: str,
    nproc: int = 2,
    env: dict[str, str] | None = None,
    master_port: int | None = None,
) -> Job:
    command = [sys.executable, "-c", code, str(folder), *arguments]
    return Job(command=command, nproc=nproc, env=env or {}, master_port=master_port)


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, "processes of the job are alive 10 s after its end"
        time.sleep(0.05)
