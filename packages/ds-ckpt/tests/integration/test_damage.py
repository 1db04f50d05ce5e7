"""Damage of every kind in every file of a checkpoint of two ranks: reported with the file, and the tensor in it."""

from __future__ import annotations

import itertools
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from ds_ckpt.config import ShardedConfig
from ds_ckpt.formats import read
from ds_ckpt.sharded import ShardedCheckpoint
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Chunk, Piece
from ds_core.testing.checkpoint import snapshot
from ds_core.testing.ranks import run_ranks


def save(directory: str) -> None:
    import torch.distributed as dist

    engine = ShardedCheckpoint(ShardedConfig(writers=2, chunk_bytes=256), dist.group.WORLD)
    given = snapshot(1, parts=3, rank=dist.get_rank(), world_size=2)
    for tag in ("tag", "other"):
        engine.save(Path(directory), tag, given, latest=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    run_ranks([partial(save, str(directory))], 2)
    return directory


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy")) / "tag"


def load(folder: Path) -> None:
    with ShardedCheckpoint(None, None).open(folder.parent, folder.name) as reader:
        reader.read(
            [
                Piece(of, Chunk.whole(of.shape), torch.zeros(of.shape, dtype=getattr(torch, of.dtype)))
                for of in reader.tensors()
            ]
        )


def error_of(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert "other" in str(caught.value.fix)
    return caught.value


def flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        [old] = file.read(1)
        file.seek(at)
        file.write(bytes([old ^ (1 << bit)]))


def test_it_is_whole(folder):
    load(folder)
    assert len(read(folder).files) == 4


def test_a_flipped_bit_anywhere_is_reported(folder):
    stored = read(folder)
    points = 0
    for file in stored.files.values():
        path = folder / file.name
        chunks = [(tensor.of, c) for tensor in stored.tensors.values() for c in tensor.chunks if c.file == file.name]
        assert file.header[0] + sum(chunk.nbytes for _, chunk in chunks) == file.nbytes, "every byte has a checksum"
        places = [(at, None) for at in [*range(9), *range(9, file.header[0], 211)]]
        places += [(at, of) for of, c in chunks if c.nbytes for at in (c.offset, c.offset + c.nbytes - 1)]
        for number, (at, of) in enumerate(places):
            flip(path, at, number % 8)
            error = error_of(folder)
            assert error.where == str(path)
            assert ("header" if of is None else f"{of.kind} {of.name!r}") in error.what, error
            flip(path, at, number % 8)
            points += 1
    assert points > 250
    load(folder)


def test_a_file_that_is_cut_missing_empty_or_longer_is_named(folder):
    for name in [*read(folder).files, "checkpoint.json"]:
        path = folder / name
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"x", bytes(len(whole))):
            path.write_bytes(damaged)
            assert error_of(folder).where == str(path)
        path.unlink()
        error = error_of(folder)
        assert name in str(error)
        path.write_bytes(whole)
    load(folder)


def test_swapped_files_are_named(folder):
    names = list(read(folder).files)
    for one, other in itertools.combinations(names, 2):
        contents = [(folder / name).read_bytes() for name in (one, other)]
        (folder / one).write_bytes(contents[1])
        (folder / other).write_bytes(contents[0])
        error = error_of(folder)
        assert error.where in (str(folder / one), str(folder / other))
        for name, content in zip((one, other), contents, strict=True):
            (folder / name).write_bytes(content)
    load(folder)


def test_files_of_another_save_are_named(folder):
    """The same tensors, of the same sizes, from a checkpoint of other values."""
    engine = ShardedCheckpoint(ShardedConfig(writers=1, chunk_bytes=256), None)
    for tag, version in (("one", 1), ("two", 2)):
        engine.save(folder.parent, tag, snapshot(version), latest=False)
    [of_one], [of_two] = read(folder.parent / "one").files, read(folder.parent / "two").files
    os.replace(folder.parent / "two" / of_two, folder.parent / "one" / of_one)  # noqa: PTH105
    with pytest.raises(CheckpointError, match=r"(is|are) not what was written") as caught:
        load(folder.parent / "one")
    assert caught.value.where == str(folder.parent / "one" / of_one)


def test_a_manifest_of_another_save_is_refused(folder):
    shutil.copy(folder.parent / "other" / "checkpoint.json", folder / "checkpoint.json")
    error = error_of(folder)
    assert "missing" in error.what
