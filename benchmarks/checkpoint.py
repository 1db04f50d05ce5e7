"""Saving, loading and verifying checkpoints, against torch.save, DCP and plain files that hold the same bytes.

Every turn of a save writes to a new folder on a disk that has nothing else left to write, and ends when all ranks'
bytes are synced. Loads read what the system's cache holds. The state is 1 GB of fp32, cut over the ranks by rows.

    python benchmarks/checkpoint.py                        # both world sizes: 15 minutes on two cores
    python benchmarks/checkpoint.py --only save --ranks 1
    python benchmarks/checkpoint.py --smoke --pairs 3      # a minute, says only that it runs
    python benchmarks/checkpoint.py --folder /mnt/disk     # on another disk than that of temporary files
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _checkpoints import DiskRanks, Shards, dcp_save, plain_write, read_files, torch_load, torch_save
from _pairs import MIN_PAIRS, Bar, PairTimes, time_pairs
from _ranks import Ranks, launch, launcher_ranks, threads_per_rank
from _report import Row, add_output_arguments, exact_ratio_row, finish, ratio_row

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ds_core.interfaces.checkpoint import CheckpointEngine

GB = 10**9
MIB = 2**20
# What the issue of this package asks; reading at 0.7 of the speed takes 1 / 0.7 of the time.
BARS = {
    "save vs one file": Bar(1.15),
    "save vs torch.save": Bar(1.0),
    "save vs DCP": Bar(1.0),
    "load vs torch.load": Bar(1.0),
    # Both into new memory. Ours reads and sums the same bytes: it costs what the sum costs, a fifth of a read.
    "open().tensor() vs torch.load": None,
    "verify vs reading": Bar(1 / 0.7),
    "async stall vs one copy": Bar(1.2),
    "load of another world vs the same": Bar(1.5),
}
PARTS = ["save", "load", "verify", "async", "worlds", "memory"]


@dataclass(frozen=True)
class Case:
    """One row's setting, the same on every rank."""

    name: str
    folder: str
    total_bytes: int
    pairs: int
    warmup: int
    options: tuple[tuple[str, int], ...] = ()


def sharded(case: Case) -> CheckpointEngine:
    from ds_ckpt.config import ShardedConfig
    from ds_ckpt.sharded import ShardedCheckpoint

    return ShardedCheckpoint(ShardedConfig(**dict(case.options)), _group())


def in_background(case: Case) -> CheckpointEngine:
    from ds_ckpt.background import AsyncCheckpoint
    from ds_ckpt.config import AsyncConfig

    return AsyncCheckpoint(AsyncConfig(**dict(case.options)), _group())


def _group() -> Any:
    import torch.distributed as dist

    return dist.group.WORLD if dist.get_world_size() > 1 else None


def turns(folder: Path, save: Callable[[Path], object]) -> Callable[[], object]:
    """Return what runs ``save`` into a folder of its own each time."""
    names = count()
    return lambda: save(folder / f"turn-{next(names)}")


def timed(ours: Callable[[], object], peer: Callable[[], object], case: Case, ranks: Any) -> dict[str, Any]:
    times = time_pairs(ours, peer, pairs=case.pairs, warmup=case.warmup, ranks=ranks)
    return {"ours": times.ours, "peer": times.peer}


def save_worker(ranks: Ranks, case: Case) -> dict[str, Any]:
    folder = Path(case.folder)
    shards, engine = Shards.make(case.total_bytes, ranks), sharded(case)
    if case.name == "save vs one file":
        peer: Callable[[Path], object] = partial(plain_write, shards)
    elif case.name == "save vs torch.save":
        peer = partial(torch_save, shards)
    else:
        peer = partial(dcp_save, shards.as_dtensors())
    return timed(
        turns(folder / "ours", lambda place: shards.save(engine, place)),
        turns(folder / "peer", peer),
        case,
        Both(ranks, folder),
    )


class Both(DiskRanks):
    """Cleans up after both contenders."""

    def __init__(self, ranks: Ranks, folder: Path, **more: Any) -> None:
        super().__init__(ranks, folder, **more)
        self._of_peer = DiskRanks(ranks, folder / "peer")
        self._folder = folder / "ours"

    def align(self) -> None:
        self._of_peer.align()
        super().align()


def load_worker(ranks: Ranks, case: Case) -> dict[str, Any]:
    folder = Path(case.folder)
    shards, engine = Shards.make(case.total_bytes, ranks), sharded(case)
    shards.save(engine, folder / "ours")
    torch_save(shards, folder / "peer")

    def ours() -> None:
        shards.load(engine, folder / "ours")

    def ours_new() -> object:
        import ds_ckpt

        with ds_ckpt.open(folder / "ours") as checkpoint:
            return [checkpoint.tensor(name, "exp_avg") for name in checkpoint.names()]

    chosen = ours if case.name == "load vs torch.load" else ours_new
    return timed(chosen, lambda: torch_load(shards, folder / "peer"), case, ranks)


def verify_worker(ranks: Ranks, case: Case) -> dict[str, Any]:
    from ds_ckpt import formats
    from ds_ckpt.verify import find_damage

    folder = Path(case.folder)
    Shards.make(case.total_bytes, ranks).save(sharded(case), folder)
    paths = sorted((folder / "tag").glob("*.safetensors"))
    buffer = bytearray(2**22)

    def ours() -> None:
        damage = list(find_damage(formats.read(folder / "tag"), lambda nbytes: None))
        if damage:
            raise RuntimeError(f"damage where there is none: {damage}")

    return timed(ours, lambda: read_files(paths, buffer), case, ranks)


def async_worker(ranks: Ranks, case: Case) -> dict[str, Any]:
    """The time that training stands still for a save, with nothing in flight, and that of one copy of the shard."""
    folder = Path(case.folder)
    shards, engine = Shards.make(case.total_bytes, ranks), in_background(case)
    copies = [torch.zeros_like(part) for part in shards.parts]

    def peer() -> None:
        for copy, part in zip(copies, shards.parts, strict=True):
            copy.copy_(part)

    found = timed(
        turns(folder / "ours", lambda place: shards.save(engine, place)),
        peer,
        case,
        Both(ranks, folder, before=engine.commit),
    )
    engine.close()
    return found


def write_worker(ranks: Ranks, case: Case) -> dict[str, Any]:
    Shards.make(case.total_bytes, ranks).save(sharded(case), Path(case.folder) / f"world-{ranks.world_size}")
    return {}


def worlds_worker(ranks: Ranks, case: Case) -> dict[str, Any]:
    """Loads here what another number of ranks wrote, and what as many wrote."""
    folder = Path(case.folder)
    shards, engine = Shards.make(case.total_bytes, ranks), sharded(case)
    (other,) = (path for path in folder.glob("world-*") if path.name != f"world-{ranks.world_size}")
    return timed(
        lambda: shards.load(engine, other),
        lambda: shards.load(engine, folder / f"world-{ranks.world_size}"),
        case,
        ranks,
    )


def memory_worker(ranks: Ranks, case: Case) -> dict[str, Any]:
    """Bytes that the process grows by at its largest: in a save, a load, or a save in the background."""
    folder = Path(case.folder)
    shards = Shards.make(case.total_bytes, ranks)
    # What is loaded once, such as modules and collectives, is no part of it.
    small = Shards.make(10**6, ranks)
    engine = in_background(case) if case.name == "async" else sharded(case)
    small.save(engine, folder / "small")
    engine.commit()
    small.load(engine, folder / "small")
    if case.name == "load":
        shards.save(engine, folder / "tag")
    ranks.align()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if case.name == "load":
        shards.load(engine, folder / "tag")
    else:
        shards.save(engine, folder / "tag")
        engine.commit()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    answer = {"grown": ranks.slowest(grown), "shard": shards.nbytes}
    engine.close()
    return answer


ALONE = ("verify vs reading", "open().tensor() vs torch.load")
"""What one process does, whoever wrote."""
WORKERS: dict[str, Sequence[tuple[str, Callable[..., Any]]]] = {
    "save": [(f"save vs {peer}", save_worker) for peer in ("one file", "torch.save", "DCP")],
    "load": [("load vs torch.load", load_worker), ("open().tensor() vs torch.load", load_worker)],
    "verify": [("verify vs reading", verify_worker)],
    "async": [("async stall vs one copy", async_worker)],
}


def in_folder(case: Case, run: Callable[[Case], Any]) -> Any:
    """Run with a folder of its own below that of ``case``, which is removed at the end."""
    folder = tempfile.mkdtemp(prefix="ds-checkpoint-", dir=case.folder)
    try:
        return run(replace(case, folder=folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def time_row(case: Case, worker: Callable[..., Any], ranks: int) -> Row:
    answer = in_folder(case, lambda inner: launch(worker, inner, ranks=ranks))
    size = f"{case.total_bytes / GB:g} GB"
    name = f"{case.name}, {size}, {ranks} rank{'s' if ranks > 1 else ''}"
    return ratio_row(name, PairTimes(answer["ours"], answer["peer"]), BARS[case.name])


def worlds_row(case: Case, ranks: int) -> Row:
    # 3 ranks' parts and those of 2 have no edge in common but the ends.
    other = 2 if ranks == 1 else 3

    def run(inner: Case) -> Any:
        for world in (other, ranks):
            launch(write_worker, inner, ranks=world)
        return launch(worlds_worker, inner, ranks=ranks)

    answer = in_folder(case, run)
    name = f"load of what {other} wrote vs what {ranks} wrote, {ranks} rank{'s' if ranks > 1 else ''}"
    return ratio_row(name, PairTimes(answer["ours"], answer["peer"]), BARS[case.name])


def memory_rows(case: Case, ranks: int) -> list[Row]:
    found = []
    for what in ("save", "load", "async"):
        answer = in_folder(replace(case, name=what), lambda inner: launch(memory_worker, inner, ranks=ranks))
        name = f"memory a process grows by in {what} vs its shard, {ranks} rank{'s' if ranks > 1 else ''}"
        found.append(exact_ratio_row(name, answer["grown"] / MIB, answer["shard"] / MIB, None, unit="MiB"))
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="some of the rows (default: all)")
    ranks = [1, 2] if not torch.cuda.is_available() else [1, 2][: torch.cuda.device_count()]
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=ranks,
        metavar="N",
        help="processes (default: 1 and 2, or 1 on one GPU)",
    )
    parser.add_argument("--gb", type=float, default=1.0, metavar="X", help="10^9 bytes of state (default 1)")
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS, metavar="N", help=f"timed pairs (default {MIN_PAIRS})")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="turns of each before the first timed one")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: that of temporary files)")
    parser.add_argument("--writers", type=int, default=None, help="checkpoint.sharded.writers (default: the engine's)")
    parser.add_argument("--smoke", action="store_true", help="10 MB: shows that the script runs, not how fast")
    add_output_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if launcher_ranks():
        raise SystemExit("this script starts its own ranks: run it without a launcher")
    total_bytes = 10**7 if arguments.smoke else int(arguments.gb * GB)
    case = Case(
        name="",
        folder=str(arguments.folder or tempfile.gettempdir()),
        total_bytes=total_bytes,
        pairs=arguments.pairs,
        warmup=arguments.warmup,
        options=() if arguments.writers is None else (("writers", arguments.writers),),
    )
    rows: list[Row] = []
    for ranks in arguments.ranks:
        for part in arguments.only:
            if part == "worlds":
                rows.append(worlds_row(replace(case, name="load of another world vs the same"), ranks))
            elif part == "memory":
                rows += memory_rows(case, ranks)
            else:
                chosen = [(name, worker) for name, worker in WORKERS[part] if ranks == 1 or name not in ALONE]
                rows += [time_row(replace(case, name=name), worker, ranks) for name, worker in chosen]
    settings = {
        "bytes": total_bytes,
        "ranks": arguments.ranks,
        "threads_per_rank": [threads_per_rank(ranks) for ranks in arguments.ranks],
        "options": dict(case.options),
    }
    return finish("checkpoints", rows, settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
