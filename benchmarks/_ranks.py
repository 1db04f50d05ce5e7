"""Runs a benchmark's worker on several ranks, and keeps the ranks in step while they time.

Without a launcher the script starts its own ranks: one per GPU with nccl, or ``CPU_RANKS`` with gloo without a GPU.
Under ``ds run`` or torchrun (RANK and WORLD_SIZE are set) each process is one rank of theirs.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CPU_RANKS", "Ranks", "default_ranks", "launch", "launcher_ranks", "threads_per_rank", "usable_cores"]

CPU_RANKS = 2
TIMEOUT_S = 3600.0


@dataclass
class Ranks:
    """This rank's place among those of the benchmark. Its collectives run on the default group."""

    rank: int
    world_size: int
    device: torch.device
    _number: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._number = torch.zeros(1, dtype=torch.float64, device=self.device)

    def align(self) -> None:
        """Return once every rank is here and its device is idle."""
        self.finish()
        self.slowest(0.0)

    def finish(self) -> None:
        """Return once this rank's device is idle; on a CPU it always is."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def slowest(self, seconds: float) -> float:
        """Return the largest ``seconds`` of all ranks, on all ranks; works for any number."""
        self._number.fill_(seconds)
        dist.all_reduce(self._number, op=dist.ReduceOp.MAX)
        return float(self._number)


def usable_cores() -> int:
    """Return the cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_rank(ranks: int) -> int:
    """Return an equal share of the cores; more threads than cores would time the operating system's scheduler."""
    return max(1, usable_cores() // ranks)


def launcher_ranks() -> int | None:
    """Return how many ranks a launcher started, or None where the script starts its own."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else None


def default_ranks() -> int:
    """Return the number of ranks of a run for which none was asked: one per GPU, else ``CPU_RANKS``."""
    return torch.cuda.device_count() or CPU_RANKS


def launch(worker: Callable[[Ranks, Any], Any], case: Any, *, ranks: int, threads: int | None = None) -> Any | None:
    """Run ``worker(ranks, case)`` on every rank and return rank 0's answer.

    Args:
        worker: a function of a module's top level; its answer must survive JSON.
        case: its picklable argument.
        ranks: how many to start; a launcher's WORLD_SIZE wins over it.
        threads: torch's threads per rank; None: an equal share of the cores.

    Returns:
        The answer; None on the other ranks of a launcher.

    Raises:
        SystemExit: there are fewer GPUs than ranks.
        torch.multiprocessing.ProcessException: a rank raised; the message holds its traceback.
        TimeoutError: the ranks did not end within an hour. They are killed.
    """
    launched = launcher_ranks()
    if launched is not None:
        rank = int(os.environ["RANK"])
        # The group stays for the cases still to come; it ends with the process.
        answer = _as_rank(worker, case, rank, launched, threads, "env://")
        return answer if rank == 0 else None
    if torch.cuda.is_available() and ranks > torch.cuda.device_count():
        raise SystemExit(f"{ranks} ranks asked for, {torch.cuda.device_count()} GPUs found: pass a smaller --ranks")
    with tempfile.TemporaryDirectory() as folder:
        context = start_processes(
            _spawned,
            args=(worker, case, ranks, threads, folder),
            nprocs=ranks,
            join=False,
            daemon=True,
            start_method="spawn",
        )
        deadline = time.monotonic() + TIMEOUT_S
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"the {ranks} ranks of the benchmark did not end within {TIMEOUT_S:.0f} s")
        return json.loads(Path(folder, "answer.json").read_text())


def _spawned(
    rank: int, worker: Callable[[Ranks, Any], Any], case: Any, world_size: int, threads: int | None, folder: str
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    # A file, not a port: two benchmarks at once cannot meet.
    answer = _as_rank(worker, case, rank, world_size, threads, f"file://{folder}/store")
    if rank == 0:
        Path(folder, "answer.json").write_text(json.dumps(answer))
    # DDP is part of reference cycles and holds the group; gloo's threads must end before the interpreter does.
    gc.collect()
    dist.destroy_process_group()


def _as_rank(
    worker: Callable[[Ranks, Any], Any],
    case: Any,
    rank: int,
    world_size: int,
    threads: int | None,
    init_method: str,
) -> Any:
    torch.set_num_threads(threads or threads_per_rank(world_size))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", init_method=init_method, rank=rank, world_size=world_size)
    return worker(Ranks(rank, world_size, device), case)
