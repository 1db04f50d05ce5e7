"""Damage of every kind in every file of a checkpoint of two ranks: reported with the file, and the tensor in it."""

from __future__ import annotations

import itertools
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from ds_ckpt import cli
from ds_ckpt.config import ShardedConfig
from ds_ckpt.formats import read
from ds_ckpt.sharded import ShardedCheckpoint
from ds_ckpt.tags import folder_of
from ds_ckpt.verify import Damage, find_damage
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Chunk, LogicalTensor, Piece, Snapshot
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


def verify(folder: Path) -> list[Damage]:
    return list(find_damage(read(folder), lambda nbytes: None))


def said_by_the_command(folder: Path) -> CheckpointError:
    """Return what ``ds ckpt verify`` says."""
    with pytest.raises(CheckpointError) as caught:
        cli.verify(folder.parent, folder.name)
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
    assert verify(folder) == []


def test_a_flipped_bit_anywhere_is_reported(folder):
    stored = read(folder)
    points = 0
    for file in stored.files.values():
        path = folder / file.name
        chunks = [(tensor.of, c) for tensor in stored.tensors.values() for c in tensor.chunks if c.file == file.name]
        assert file.header[0] + sum(chunk.nbytes for _, chunk in chunks) == file.nbytes, "every byte has a checksum"
        places = [(at, None) for at in [*range(9), *range(9, file.header[0], 431), file.header[0] - 1]]
        # The ends of chunks in turn.
        chunks = [(of, chunk) for of, chunk in chunks if chunk.nbytes]
        places += [(c.offset + (c.nbytes - 1) * (index % 2), of) for index, (of, c) in enumerate(chunks)]
        for number, (at, of) in enumerate(places):
            flip(path, at, number % 8)
            error = error_of(folder)
            assert error.where == str(path)
            part = "header" if of is None else f"{of.kind} {of.name!r}"
            assert part in error.what, error
            if number % 4 == 0:
                [damage] = verify(folder)
                assert (damage.file, part in damage.what) == (file.name, True), damage
            flip(path, at, number % 8)
            points += 1
    assert points > 100
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
    assert len({(folder / name).stat().st_size for name in names}) > 1, "some have another size"
    for one, other in itertools.combinations(names, 2):
        contents = [(folder / name).read_bytes() for name in (one, other)]
        (folder / one).write_bytes(contents[1])
        (folder / other).write_bytes(contents[0])
        for error in (error_of(folder), said_by_the_command(folder)):
            assert one in str(error) or other in str(error), error
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
    error = said_by_the_command(folder.parent / "one")
    assert error.where == str(folder.parent / "one" / of_one)
    assert "exp_avg 'float32.matrix'" in error.what


def twins(directory: Path) -> list[Path]:
    """Save two tensors of the same size, each in a file of its own, and return the files."""
    of = [LogicalTensor(name, "weight", (8, 8), "float32") for name in ("a", "b")]
    pieces = [Piece(each, Chunk.whole((8, 8)), torch.full((8, 8), float(index))) for index, each in enumerate(of)]
    engine = ShardedCheckpoint(ShardedConfig(writers=2, chunk_bytes=256), None)
    engine.save(directory, "tag", Snapshot(pieces, {}, {}), latest=True)
    paths = [directory / "tag" / name for name in read(directory / "tag").files]
    assert len(paths) == 2
    assert paths[0].stat().st_size == paths[1].stat().st_size
    return paths


def test_swapped_files_of_one_size_are_named(tmp_path):
    one, other = twins(tmp_path)
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    with pytest.raises(CheckpointError, match="header") as caught:
        load(tmp_path / "tag")
    assert caught.value.where in (str(one), str(other))
    error = said_by_the_command(tmp_path / "tag")
    for part in (one.name, other.name, "weight 'a'", "weight 'b'"):
        assert part in error.what


def test_swapped_contents_under_the_right_headers_name_the_tensors(tmp_path):
    one, other = twins(tmp_path)
    header = read(tmp_path / "tag").files[one.name].header[0]
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[0][:header] + contents[1][header:])
    other.write_bytes(contents[1][:header] + contents[0][header:])
    with pytest.raises(CheckpointError, match=r"weight '[ab]'") as caught:
        load(tmp_path / "tag")
    assert caught.value.where in (str(one), str(other))
    assert len(verify(tmp_path / "tag")) == 2


def test_a_flipped_bit_in_latest_leads_nowhere(folder):
    """``latest`` has no checksum: what it says must be the name of a checkpoint, and those there are told."""
    path = folder.parent / "latest"
    content = path.read_bytes()
    assert content == b"other"
    for at, bit in itertools.product(range(len(content)), range(8)):
        flip(path, at, bit)
        for find in (lambda: folder_of(folder.parent, None), lambda: by_latest(folder.parent)):
            with pytest.raises(CheckpointError) as caught:
                read(find())
            assert str(folder.parent) in caught.value.where
            assert "other" in caught.value.fix
        flip(path, at, bit)
    assert str(read(by_latest(folder.parent)).folder) == str(folder.parent / "other")


def by_latest(directory: Path) -> Path:
    return directory / ShardedCheckpoint(None, None).read_latest(directory)


def test_a_manifest_of_another_save_is_refused(folder):
    shutil.copy(folder.parent / "other" / "checkpoint.json", folder / "checkpoint.json")
    error = error_of(folder)
    assert "missing" in error.what
