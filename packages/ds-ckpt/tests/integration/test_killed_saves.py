"""SIGKILL at every create, write, sync, rename, removal and folder of a save, on either rank: old or new, but whole.

Here the engine saves a snapshot, on one and on two ranks, in several files each, over the same tag and beside it.
This file is also the script that does it: it imports torch once, and forks for every process of every case.
"""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ds_ckpt.config import ShardedConfig
from ds_ckpt.formats import read
from ds_ckpt.sharded import ShardedCheckpoint
from ds_core.interfaces.logical import Box, Chunk, LogicalTensor, Piece, Snapshot
from ds_core.testing import crash

TIMEOUT_S = 30.0


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_save_killed_at_any_point_leaves_a_whole_checkpoint(world_size, tmp_path):
    cases = crash.run_script(__file__, tmp_path, world_size)
    for name in ("same", "new"):
        for killed_rank in range(world_size):
            found = [case for case in cases if (case["name"], case["rank"]) == (name, killed_rank)]
            seen = {case["operation"] for case in found}
            expected = {"create", "write", "half a write", "sync"}
            if killed_rank == 0:
                # It goes on with the manifest, ``latest``, and what no manifest names any more.
                expected |= {"rename"} | ({"remove"} if name == "same" else {"mkdir"} if world_size == 1 else set())
            assert expected <= seen, f"{name}, rank {killed_rank}: {seen}"
            loaded = [case["loaded"] for case in found]
            assert loaded == sorted(loaded), "once it is the new one it stays the new one"
            assert loaded[0] == 1
            assert loaded[-1] == (2 if killed_rank == 0 else 1)


def test_every_write_of_a_save_is_seen(tmp_path):
    """The system counts writes, too: as many as were seen, so none goes by another way than those that are watched."""
    engine = ShardedCheckpoint(ShardedConfig(writers=2, chunk_bytes=64), None)
    seen: list[str] = []
    engine.save(tmp_path, "tag", snapshot(1, 0, 1), latest=True)  # what is loaded at the first time is loaded
    with crash.watched(lambda operation: seen.append(operation.name)):
        before = writes_of_this_process()
        engine.save(tmp_path, "tag", snapshot(2, 0, 1), latest=True)
        after = writes_of_this_process()
    assert seen.count("write") == after - before
    assert seen.count("write") > 6
    assert seen.count("rename") == 2
    assert seen.count("remove") == 2
    # Two files and their folder; the manifest and its folder, the folder of tags; ``latest`` and its folder.
    assert seen.count("sync") >= 8


def writes_of_this_process() -> int:
    counters = Path("/proc/self/io")
    if not counters.exists():
        pytest.skip("the system does not count writes")
    return int(next(line.split()[1] for line in counters.read_text().splitlines() if line.startswith("syscw:")))


# -- the script -------------------------------------------------------------------------------------------------------


def snapshot(version: int, rank: int, world_size: int) -> Snapshot:
    """Return what a rank saves: a whole tensor, a shard of one, an empty one. Every element tells the version."""
    whole = LogicalTensor("whole", "weight", (4, 3), "float32")
    cut = LogicalTensor("cut", "master", (2 * world_size, 5), "float64")
    empty = LogicalTensor("empty", "weight", (0, 2), "float32")
    box = Box((0, 0), cut.shape)
    pieces = [
        Piece(whole, Chunk.whole(whole.shape), torch.full(whole.shape, float(version))),
        Piece(cut, Chunk(box, 10 * rank, 10), torch.full((10,), float(version), dtype=torch.float64), rank),
        Piece(empty, Chunk.whole(empty.shape), torch.zeros(empty.shape), world_size - 1),
    ]
    return Snapshot(pieces, {"version": version}, {"rank": rank, "version": version})


def engine_of(world_size: int) -> ShardedCheckpoint:
    group = dist.group.WORLD if world_size > 1 else None
    return ShardedCheckpoint(ShardedConfig(writers=2, chunk_bytes=64), group)


def version_of(folder: Path, tag: str) -> int:
    """Return the version of a tag, having checked that all of it is there."""
    with engine_of(1).open(folder, tag) as reader:
        version = reader.state["version"]
        pieces = []
        for of in reader.tensors():
            pieces.append(Piece(of, Chunk.whole(of.shape), torch.full(of.shape, -1, dtype=getattr(torch, of.dtype))))
        assert sorted(piece.of.name for piece in pieces) == ["cut", "empty", "whole"]
        reader.read(pieces)
        assert all((piece.data == version).all() for piece in pieces), "a mixture"
        assert [reader.rank_state(rank) for rank in range(reader.world_size)] == [
            {"rank": rank, "version": version} for rank in range(reader.world_size)
        ]
    return version


def save(folder: Path, rank: int, world_size: int, store: Path, tag: str, version: int) -> None:
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=store.as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=TIMEOUT_S),
        )
        # Which rank makes the folder is a race; with it every later operation would have another number in each run.
        (folder / tag).mkdir(exist_ok=True)
    given = snapshot(version, rank, world_size)
    crash.ready()
    engine_of(world_size).save(folder, tag, given, latest=True)


def check(folder: Path, tag: str) -> int:
    """Load what ``latest`` names, and every tag that must be there; then save again over what the crash left."""
    if tag == "new":
        assert version_of(folder, "same") == 1, "the previous checkpoint is untouched"
    named = (folder / "latest").read_text()
    version = version_of(folder, named)
    assert version in (1, 2)
    engine_of(1).save(folder, tag, snapshot(3, 0, 1), latest=True)
    assert version_of(folder, tag) == 3
    files = read(folder / tag).files
    assert sorted(os.listdir(folder / tag)) == sorted(["checkpoint.json", *files]), "leftovers of the crash"  # noqa: PTH208
    assert not list(folder.glob("*.tmp")), "leftovers of the crash"
    return version


def main(root: Path, world_size: int) -> None:
    import ds_core.comm.together  # noqa: F401  loaded once, before any process forks

    before = root / "before"
    before.mkdir()
    first = [crash.fork(save, before, rank, world_size, root / "store", "same", 1) for rank in range(world_size)]
    assert crash.ends_of(first) == [0] * world_size
    cases = crash.kill_everywhere(
        root,
        before,
        world_size,
        ("same", "new"),
        lambda folder, rank, store, tag: save(folder, rank, world_size, store, tag, 2),
        check,
    )
    print(crash.as_json(cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
