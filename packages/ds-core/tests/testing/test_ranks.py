import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from ds_core.testing.ranks import RankError, expect_rank_errors, run_ranks


@dataclass
class Seen:
    rank: int
    tensor: torch.Tensor


def environment():
    return {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "EXTRA")}


def summed(value):
    tensor = torch.full((3,), value * (dist.get_rank() + 1.0))
    dist.all_reduce(tensor)
    return Seen(dist.get_rank(), tensor)


def draw():
    return torch.rand(1).item()


def own_group():
    first = torch.distributed.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group("gloo")
    total = torch.ones(())
    dist.all_reduce(total)
    return first, total.item()


def process_id():
    return os.getpid(), torch.get_num_threads()


def test_functions_run_in_order_on_ranks_of_one_spawn():
    functions = [process_id, environment, partial(summed, 2.0), draw, draw, own_group, process_id]
    results = run_ranks(functions, 2, env={"EXTRA": "yes"})
    assert results[0] == results[-1]
    assert len({pid for pid, _ in results[0]}) == 2
    assert [threads for _, threads in results[0]] == [1, 1]
    for rank in range(2):
        assert results[1][rank] == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
            "EXTRA": "yes",
        }
        assert results[2][rank].rank == rank
        assert torch.equal(results[2][rank].tensor, torch.full((3,), 6.0))
    assert results[3] == results[4], "generators are seeded before every function"
    assert results[5] == [(2, 2.0), (2, 2.0)]
    assert "EXTRA" not in os.environ


def rank_one_raises():
    if dist.get_rank() == 1:
        raise ValueError("one is odd")
    dist.barrier()


def never_reached():
    raise AssertionError("a function ran after one had failed")


def test_error_carries_each_rank_and_where_the_others_are():
    with pytest.raises(RankError, match="rank_one_raises failed on rank 1, did not end after that on rank 0") as caught:
        run_ranks([rank_one_raises, never_reached], 2)
    error = caught.value
    assert error.errors == {1: "ValueError: one is odd"}
    assert error.function == "rank_one_raises"
    assert 'raise ValueError("one is odd")' in error.tracebacks[1]
    assert list(error.stuck) == [0]
    assert "in barrier" in error.stuck[0]
    assert "in rank_one_raises" in error.stuck[0]
    assert 'raise ValueError("one is odd")' in str(error)
    assert "in barrier" in str(error)


def rank_zero_sleeps():
    if dist.get_rank() == 0:
        time.sleep(1000)


def test_timeout_names_the_ranks_that_did_not_end():
    with pytest.raises(RankError, match=r"rank_zero_sleeps did not end within 1 s on rank 0") as caught:
        run_ranks([rank_zero_sleeps], 2, timeout_s=1.0)
    assert caught.value.errors == {}
    assert "in rank_zero_sleeps" in caught.value.stuck[0]


def every_rank_raises():
    raise KeyError(dist.get_rank())


def ranks_die():
    print("last words", flush=True)
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(3)


def test_expected_errors_are_returned():
    assert expect_rank_errors(every_rank_raises, 2) == {0: "KeyError: 0", 1: "KeyError: 1"}
    assert expect_rank_errors(ranks_die, 2) == {0: "Signal: SIGKILL", 1: "ExitCode: 3"}


def test_a_dead_rank_leaves_its_last_lines():
    with pytest.raises(RankError, match="last words"):
        run_ranks([ranks_die], 1)


def test_a_hang_is_never_expected():
    with pytest.raises(RankError, match="did not end within 1 s on rank 0"):
        expect_rank_errors(rank_zero_sleeps, 2, timeout_s=1.0)


def start_orphan(folder):
    child = textwrap.dedent(f"""
        import os, subprocess, sys, time
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
        open({str(folder)!r} + "/" + os.environ["RANK"], "w").write(f"{{os.getpid()}} {{grandchild.pid}}")
    """)
    subprocess.run([sys.executable, "-c", child], check=True)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    me = psutil.Process()
    before = me.num_fds()
    run_ranks([partial(start_orphan, tmp_path)], 2)
    for rank in range(2):
        for pid in map(int, (tmp_path / str(rank)).read_text().split()):
            assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert me.num_fds() == before
    assert me.children(recursive=True) == []
    assert list(temporary.iterdir()) == []


SCRIPT = """
import os, time
from ds_core.testing.ranks import run_ranks

def wait():
    open(os.environ["PIDS"], "a").write(f"{os.getpid()}\\n")
    time.sleep(1000)

if __name__ == "__main__":
    run_ranks([wait], 2)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_their_caller(tmp_path, sent):
    script, pids, temporary = tmp_path / "script.py", tmp_path / "pids", tmp_path / "temporary"
    script.write_text(SCRIPT)
    temporary.mkdir()
    caller = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PIDS": str(pids), "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: pids.exists() and len(pids.read_text().splitlines()) == 2)
        caller.send_signal(sent)
        _, errors = caller.communicate(timeout=30)
    finally:
        caller.kill()
        caller.communicate()
    assert caller.returncode == -sent
    assert ("KeyboardInterrupt" in errors) == (sent == signal.SIGINT)
    for pid in map(int, pids.read_text().split()):
        wait_for(lambda pid=pid: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    assert list(temporary.iterdir()) == []


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)


def test_misuse_is_refused():
    with pytest.raises(TypeError, match=r"<lambda> cannot be sent to a rank.*pass a function of a module"):
        run_ranks([lambda: None], 1)
    with pytest.raises(ValueError, match="world_size is 0"):
        run_ranks([draw], 0)


def unpicklable():
    return lambda: None


def test_a_result_that_cannot_travel_is_that_ranks_error():
    with pytest.raises(RankError) as caught:
        run_ranks([unpicklable], 1)
    assert "pickle" in caught.value.errors[0]


def test_a_file_pytest_imports_by_path_is_found(tmp_path):
    """The file lies in a folder that is on nobody's path and has the name of a package that exists."""
    folder = tmp_path / "json"
    folder.mkdir()
    (folder / "test_inner.py").write_text(
        "from ds_core.testing.ranks import run_ranks\n"
        "class Result:\n    pass\n"
        "def function():\n    import json.decoder\n    return Result()\n"
        "def test():\n    assert type(run_ranks([function], 1)[0][0]) is Result\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert Path(folder).is_dir()
