"""The end of a script that leaves the process group to us."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import atexit, os, sys, torch

def threads():
    return sorted(open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task"))

# Registered before ours, so it runs after it.
atexit.register(lambda: print("at exit", "gloo" in " ".join(threads()) or len(threads()) > before))
before = len(threads())
import ds_core
engine, *_ = ds_core.initialize(
    model=torch.nn.Linear(2, 1), config={"train_batch_size": 1, "optimizer": {"type": "AdamW"}, "log_level": "error"}
)
engine.backward(engine(torch.ones(1, 2)).sum())
engine.step()
torch.distributed.barrier()
print("in the script", len(threads()) > before)
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    env_free = [sys.executable, "-c", script]
    return subprocess.run(env_free, capture_output=True, text=True, timeout=120, check=False)


def test_the_threads_of_the_process_group_end_before_the_interpreter():
    ended = run(SCRIPT)
    assert ended.stdout.splitlines() == ["in the script True", "at exit False"], ended.stderr
    assert ended.returncode == 0


def test_after_an_uncaught_exception_nothing_is_awaited():
    ended = run(SCRIPT + "\nraise ValueError('the script fails')")
    assert ended.stdout.splitlines() == ["in the script True", "at exit True"]
    assert ended.stderr.rstrip().endswith("ValueError: the script fails")
