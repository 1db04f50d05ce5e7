"""What ranks get: variables, arguments, streams."""

from __future__ import annotations

import json
import os
import pty
import subprocess

import psutil
import pytest

PRINT_ENV = """
    import json
    say(json.dumps({key: value for key, value in os.environ.items()}))
"""


def rank_lines(text: str, rank: int, world: int) -> list[str]:
    """The lines rank ``rank`` printed, without their prefix."""
    prefix = f"[rank {rank}] "
    others = tuple(f"[rank {other}] " for other in range(1, world))
    if rank == 0:
        return [line for line in text.splitlines() if not line.startswith(others)]
    return [line.removeprefix(prefix) for line in text.splitlines() if line.startswith(prefix)]


def test_every_rank_sees_its_place(jobs):
    result = jobs.run(PRINT_ENV, "--nproc", "3")
    assert (result.code, result.error) == (0, "")
    envs = [json.loads(rank_lines(result.text, rank, 3)[0]) for rank in range(3)]
    for rank, env in enumerate(envs):
        expected = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "3",
            "LOCAL_SIZE": "3",
            "CROSS_RANK": "0",
            "CROSS_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 3)),
        }
        assert {key: env[key] for key in expected} == expected
    assert len({env["MASTER_PORT"] for env in envs}) == 1
    assert 0 < int(envs[0]["MASTER_PORT"]) < 65536


def test_threads_set_by_the_user_stay(jobs):
    result = jobs.run("print(os.environ['OMP_NUM_THREADS'])", "--nproc", "1", env={"OMP_NUM_THREADS": "7"})
    assert result.text == "7\n"


def test_arguments_arrive_untouched(jobs):
    args = ("-x", "--nproc", "9", "--", "--dry-run", "a b", "", "$HOME", "-m", "--", b"\xff\xfe")
    result = jobs.run("say(ascii(sys.argv[1:]))", "--nproc", "2", args=args)
    expected = ascii([arg.decode(errors="surrogateescape") if isinstance(arg, bytes) else arg for arg in args])
    assert rank_lines(result.text, 0, 2) == [expected]
    assert rank_lines(result.text, 1, 2) == [expected]


@pytest.mark.parametrize("flag", ["--num_gpus", "--num-gpus", "--nproc-per-node", "--nproc"])
def test_all_spellings_of_the_number_of_ranks(jobs, flag):
    result = jobs.run("say(world)", flag, "2", env={"CUDA_VISIBLE_DEVICES": ""})
    assert sorted(result.text.split()) == ["1]", "2", "2", "[rank"]


def test_default_is_one_rank_per_visible_gpu(jobs):
    assert jobs.run("say(world)", env={"CUDA_VISIBLE_DEVICES": "GPU-aa"}).text == "1\n"
    assert jobs.run("if rank == 0: say(world)", env={"CUDA_VISIBLE_DEVICES": "4,7"}).text == "2\n"


def test_local_rank_is_an_argument_only_on_request(jobs):
    text = "say(sys.argv[1:])"
    assert jobs.run(text, "--nproc", "1", args=("-a",)).text == "['-a']\n"
    result = jobs.run(text, "--nproc", "2", "--local_rank", args=("-a",))
    assert rank_lines(result.text, 0, 2) == ["['--local_rank=0', '-a']"]
    assert rank_lines(result.text, 1, 2) == ["['--local_rank=1', '-a']"]


def test_module(jobs):
    (jobs.folder / "pkg").mkdir()
    (jobs.folder / "pkg" / "train.py").write_text("import sys; print(__name__, __package__, sys.argv[1:])")
    result = jobs.start_command("run", "--nproc", "1", "-m", "pkg.train", "-m", "x").finish()
    assert result.text == "__main__ pkg ['-m', 'x']\n"


def test_no_python(jobs):
    program = jobs.folder / "program.sh"
    program.write_text('#!/bin/sh\necho "$RANK of $WORLD_SIZE: $*"\n')
    program.chmod(0o755)
    result = jobs.start_command("run", "--nproc", "1", "--no_python", str(program), "a").finish()
    assert result.text == "0 of 1: a\n"


def test_bytes_that_are_no_text_pass_through(jobs):
    text = r"""
        for stream in (sys.stdout, sys.stderr):
            stream.buffer.write(b"\xff\xfe\x00 caf\xe9\n")
    """
    result = jobs.run(text, "--nproc", "2")
    assert result.code == 0
    assert sorted(result.out.split(b"\n")) == [b"", b"[rank 1] \xff\xfe\x00 caf\xe9", b"\xff\xfe\x00 caf\xe9"]
    assert sorted(result.err.split(b"\n")) == sorted(result.out.split(b"\n"))


def test_output_without_a_final_newline_is_complete(jobs):
    result = jobs.run("sys.stdout.write('no end') if rank else None", "--nproc", "2")
    assert result.text == "[rank 1] no end\n"


def test_100k_lines_on_both_streams_of_every_rank(jobs):
    text = """
        for number in range(25_000):
            say("out", number)
            say("err", number, fd=2)
    """
    result = jobs.run(text, "--nproc", "2")
    assert result.code == 0
    for stream, text in (("out", result.text), ("err", result.error)):
        for rank in range(2):
            assert rank_lines(text, rank, 2) == [f"{stream} {number}" for number in range(25_000)]


def test_rank_0_has_the_terminal(jobs):
    master, slave = pty.openpty()
    text = "say(sys.stdout.isatty())"
    try:
        job = jobs.start(text, "--nproc", "2", stdout=slave)
        assert job.finish().code == 0
        shown = os.read(master, 4096).decode().split("\r\n")
    finally:
        os.close(master)
        os.close(slave)
    assert sorted(shown) == ["", "True", "[rank 1] False"]


def test_rank_0_reads_standard_input_and_no_other_rank_does(jobs):
    job = jobs.start("say(sys.stdin.read())", "--nproc", "2", stdin=subprocess.PIPE)
    out, _ = job.popen.communicate(b"hello", timeout=30)
    assert sorted(out.decode().split("\n")) == ["", "[rank 1] ", "hello"]


def test_output_that_nobody_reads_any_more_does_not_end_the_job(jobs):
    text = """
        if rank == 1:
            for number in range(20_000):
                print(number)
            say("done", fd=2)
    """
    job = jobs.start(text, "--nproc", "2")
    job.lines(1)
    job.popen.stdout.close()
    job.popen.stdout = None
    result = job.finish()
    assert (result.code, result.error) == (0, "[rank 1] done\n")


def test_logs_hold_every_rank_and_the_terminal_still_shows_it(jobs):
    text = "say('out', rank); say('err', rank, fd=2)"
    result = jobs.run(text, "--nproc", "2", "--log-dir", "logs/deep")
    assert sorted(result.text.splitlines()) == ["[rank 1] out 1", "out 0"]
    assert sorted(result.error.splitlines()) == ["[rank 1] err 1", "err 0"]
    for rank in range(2):
        lines = (jobs.folder / "logs" / "deep" / f"rank_{rank}.log").read_text().splitlines()
        assert sorted(lines) == [f"err {rank}", f"out {rank}"]


def test_nothing_is_printed_by_a_job_that_prints_nothing(jobs):
    result = jobs.run("pass", "--nproc", "2")
    assert (result.code, result.out, result.err) == (0, b"", b"")


def test_the_launcher_and_its_agent_load_no_torch(jobs):
    job = jobs.start("say('ready'); sys.stdin.read()", "--nproc", "1", stdin=subprocess.PIPE)
    job.lines(1)
    agent = psutil.Process(job.popen.pid).children()[0]
    for process in (psutil.Process(job.popen.pid), agent):
        assert not [entry.path for entry in process.memory_maps() if "torch" in entry.path]
    job.popen.stdin.close()
    job.popen.stdin = None
    assert job.finish().code == 0
