"""Disks that fail at any file operation of a save: it says what and where, and the previous checkpoint stays whole."""

from __future__ import annotations

import errno
import itertools
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from ds_ckpt.config import ShardedConfig
from ds_ckpt.formats import read
from ds_ckpt.sharded import ShardedCheckpoint
from ds_ckpt.verify import find_damage
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Chunk, LogicalTensor, Piece, Snapshot
from ds_core.testing import crash
from ds_core.testing.ranks import run_ranks

FAULTS = {
    "create": (errno.EACCES, errno.EROFS, errno.ENOSPC),
    "write": (errno.ENOSPC, errno.EDQUOT, errno.EIO),
    "sync": (errno.EIO, errno.EDQUOT),
    "rename": (errno.EIO, errno.ENOSPC),
    "mkdir": (errno.EACCES, errno.EROFS, errno.ENOSPC),
}
"""Operation -> what it may fail with."""
CONFIG = ShardedConfig(writers=2, chunk_bytes=256)
OF = [LogicalTensor(name, "weight", (8, 8), "float32") for name in ("a", "b")]


def snapshot(version: int, rank: int = 0, world_size: int = 1) -> Snapshot:
    """Return two tensors, each for a file of its own; with two ranks each of them writes a half of both."""
    pieces = []
    for of in OF:
        for part in range(world_size):
            chunk = Chunk(Chunk.whole(of.shape).box, 64 * part // world_size, 64 // world_size)
            pieces.append(Piece(of, chunk, torch.full((chunk.length,), float(version)), part))
    return Snapshot(pieces, {"version": version}, {"rank": rank})


def fail_at(nth: int, name: str, code: int):
    """Let the ``nth`` operation called ``name`` fail; what comes after it works."""
    seen = 0

    def before(operation: crash.Operation) -> None:
        nonlocal seen
        if operation.name == name:
            seen += 1
            if seen - 1 == nth:
                raise OSError(code, os.strerror(code))

    return crash.watched(before)


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def whole(directory: Path, tag: str, version: int) -> None:
    with ShardedCheckpoint(None, None).open(directory, tag) as reader:
        assert reader.state == {"version": version}
        pieces = [Piece(of, Chunk.whole(of.shape), torch.zeros(of.shape)) for of in OF]
        reader.read(pieces)
        assert all((piece.data == version).all() for piece in pieces)
    assert list(find_damage(read(directory / tag), lambda nbytes: None)) == []


def failed_save(engine: ShardedCheckpoint, directory: Path, tag: str, name: str, nth: int, code: int) -> str | None:
    """Save version 2 over version 1 with one fault; return which version there is then, None where nothing failed."""
    before = listing(directory)
    error = None
    with fail_at(nth, name, code):
        try:
            engine.save(directory, tag, snapshot(2), latest=True)
        except CheckpointError as caught:
            error = caught
    case = f"{name} {nth} with {errno.errorcode[code]} under {tag!r}"
    if error is None:
        whole(directory, tag, 2)
        return None
    assert os.strerror(code) in error.what, case
    assert str(directory) in error.where, case
    assert error.fix, case
    if listing(directory) == before:
        found = "old"
    else:
        # The manifest was in place by then: all of the new checkpoint is there, and nothing else is.
        stored = read(directory / tag)
        assert stored.state["version"] == 2, f"{case}: it left {set(listing(directory)) - set(before)}"
        files = {f"{tag}/{name}" for name in (*stored.files, "checkpoint.json")}
        kept = {path for path in before if not path.startswith(f"{tag}/")}
        old = {path for path in before if path.startswith(f"{tag}/")}
        assert set(listing(directory)) - old == (files | kept) - old, case
        found = "new"
    if tag == "same":
        whole(directory, "same", 1 if found == "old" else 2)
    else:
        whole(directory, "same", 1)
    # What ``latest`` names is whole, too; syncing it may have been what failed.
    named = (directory / "latest").read_text()
    whole(directory, named, 1 if named != tag or found == "old" else 2)
    return found


@pytest.mark.parametrize("tag", ["same", "new"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_save_that_fails_at_any_operation_leaves_the_previous_one(name, tag, tmp_path):
    engine = ShardedCheckpoint(CONFIG, None)
    outcomes = []
    for nth in itertools.count():
        directory = tmp_path / str(nth)
        directory.mkdir()
        engine.save(directory, "same", snapshot(1), latest=True)
        code = FAULTS[name][nth % len(FAULTS[name])]
        found = failed_save(engine, directory, tag, name, nth, code)
        if found is None:
            break
        outcomes.append(found)
        engine.save(directory, tag, snapshot(3), latest=True)
        whole(directory, tag, 3)
        expected = [f"{tag}/{file}" for file in (*read(directory / tag).files, "checkpoint.json")]
        assert [path for path in listing(directory) if path.startswith(f"{tag}/")] == sorted(expected), "leftovers"
        assert not list(directory.rglob("*.tmp"))
    # Folders are there by then under the same tag, and exactly one is not under a new one.
    least = {"create": 4, "write": 4, "sync": 6, "rename": 2, "mkdir": 0 if tag == "same" else 1}[name]
    assert len(outcomes) >= least
    assert outcomes == sorted(outcomes, key=["old", "new"].index), "it is the old one until it is the new one"


def test_what_cannot_be_removed_after_a_save_fails_nothing(tmp_path, caplog):
    engine = ShardedCheckpoint(CONFIG, None)
    engine.save(tmp_path, "tag", snapshot(1), latest=True)
    with fail_at(0, "remove", errno.EACCES):
        engine.save(tmp_path, "tag", snapshot(2), latest=True)
    whole(tmp_path, "tag", 2)
    assert "Permission denied" in caplog.text
    assert len(list((tmp_path / "tag").glob("*.safetensors"))) == len(read(tmp_path / "tag").files) + 1
    engine.save(tmp_path, "tag", snapshot(3), latest=True)
    assert len(list((tmp_path / "tag").glob("*.safetensors"))) == len(read(tmp_path / "tag").files)


def test_a_disk_that_is_full_says_so(tmp_path):
    engine = ShardedCheckpoint(CONFIG, None)
    engine.save(tmp_path, "tag", snapshot(1), latest=True)
    before = listing(tmp_path)
    for size in (1, 400):
        with crash.limited_file_size(size), pytest.raises(CheckpointError, match="File too large") as caught:
            engine.save(tmp_path, "next", snapshot(2), latest=True)
        assert ("checkpoint.json" if size == 400 else ".safetensors") in caught.value.where
        assert "free space" in caught.value.fix
        assert listing(tmp_path) == before
    whole(tmp_path, "tag", 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_says_so(tmp_path):
    engine = ShardedCheckpoint(CONFIG, None)
    engine.save(tmp_path, "tag", snapshot(1), latest=True)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            engine.save(tmp_path, "next", snapshot(2), latest=True)
    finally:
        tmp_path.chmod(0o700)
    whole(tmp_path, "tag", 1)


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    engine = ShardedCheckpoint(CONFIG, None)
    engine.save(tmp_path, "tag", snapshot(1), latest=True)
    (tmp_path / "blocked").write_text("mine")
    with pytest.raises(CheckpointError) as caught:
        engine.save(tmp_path, "blocked", snapshot(2), latest=True)
    assert caught.value.where == str(tmp_path / "blocked")
    assert (tmp_path / "blocked").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError) as caught:
        engine.save(tmp_path / "file", "tag", snapshot(2), latest=True)
    assert str(tmp_path / "file") in caught.value.where
    whole(tmp_path, "tag", 1)


CASES = [
    (0, "write", 1, errno.ENOSPC),
    (1, "write", 0, errno.EDQUOT),
    (1, "sync", 0, errno.EIO),
    (1, "create", 0, errno.EROFS),
    (0, "create", 1, errno.ENOSPC),  # the manifest
    (0, "rename", 0, errno.EIO),
]
"""Rank, operation, which of them, and what it fails with; all before the manifest has its name."""


def fail_together(directory: str) -> None:
    import torch.distributed as dist

    rank, folder = dist.get_rank(), Path(directory)
    engine = ShardedCheckpoint(CONFIG, dist.group.WORLD)

    engine.save(folder, "same", snapshot(1, rank, 2), latest=True)
    before = listing(folder)
    for (failing, name, nth, code), tag in itertools.product(CASES, ("same", "new")):
        case = f"{name} {nth} of rank {failing} with {errno.errorcode[code]} under {tag!r}"
        with pytest.raises(CheckpointError) as caught, fail_at(nth if rank == failing else 10**9, name, code):
            engine.save(folder, tag, snapshot(2, rank, 2), latest=True)
        assert os.strerror(code) in str(caught.value), case
        assert str(folder) in str(caught.value), case
        assert "fix: " in str(caught.value), case
        if rank != failing:
            assert f"rank {failing}" in str(caught.value), case
        dist.barrier()
        assert listing(folder) == before, case
        if rank == 0:
            whole(folder, "same", 1)
        dist.barrier()
    engine.save(folder, "new", snapshot(3, rank, 2), latest=True)
    whole(folder, "new", 3)


def test_a_disk_that_fails_on_one_rank_fails_on_all(tmp_path):
    run_ranks([partial(fail_together, str(tmp_path))], 2)
