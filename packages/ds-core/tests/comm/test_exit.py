"""The end of a script that leaves the process group to us."""

from __future__ import annotations

import os
import socket
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


PEERS = """
import sys, torch, ds_core

class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("broken on purpose")

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)

    def forward(self, x, breaks):
        hidden = self.first(x)
        return self.last(Breaks.apply(hidden) if breaks else hidden).sum()

engine, *_ = ds_core.initialize(
    model=Model(),
    config={
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW"},
        "partition": {"replicated": {"bucket_bytes": 1}},
    },
)
# In the first, ranks wait for each other before anything is sent.
engine.backward(engine(torch.ones(1, 2), False))
engine.step()
breaks = engine.global_rank == 1
if not breaks:
    print("ready", flush=True)
    sys.stdin.read()  # until the test lets this rank go on
engine.backward(engine(torch.ones(1, 2), breaks))
"""


def test_a_rank_that_raised_ends_while_its_peer_is_busy():
    """It has started a collective by then, which torch would wait for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen([sys.executable, "-c", PEERS], env={**os.environ, **job, "RANK": str(rank)}, **pipes)
        for rank in range(2)
    ]
    try:
        assert ranks[0].stdout.readline() == "ready\n"
        _, said = ranks[1].communicate(timeout=60)
        assert ranks[0].poll() is None
        assert ranks[1].returncode == 1
        assert said.rstrip().endswith("ValueError: broken on purpose")
        _, said = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode == 1
        assert "CommError: the gradients could not be summed over the ranks" in said
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


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


FAILS = """
import torch, ds_core
engine, *_ = ds_core.initialize(model=torch.nn.Linear(2, 1), config={"train_batch_size": 1, "log_level": "error"})

def close():
    raise ds_core.errors.CheckpointError("the disk is full")

engine.parts.checkpoint.close = close
print("the script has ended", flush=True)
"""


def test_a_checkpoint_that_could_not_be_completed_is_no_good_end():
    done = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout == "the script has ended\n"
    assert "the disk is full" in done.stderr
    assert "Exception ignored" not in done.stderr


MANY = """
import atexit, gc
import ds_core

collections = []
count = lambda phase, info: phase == "stop" and info["generation"] == 2 and collections.append(1)
# Registered before ours, so it runs after it.
atexit.register(lambda: print(len(collections)))
for _ in range(20):
    ds_core.init_distributed(verbose=False)
    ds_core.comm.destroy_process_group()
ds_core.init_distributed(verbose=False)
collections.clear()
gc.collect()
gc.callbacks.append(count)
"""


def test_the_end_comes_once_however_many_groups_there_were():
    """Each collection of a large process takes a second."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", MANY], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) <= 2
