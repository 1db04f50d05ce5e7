"""The files of a rank: safetensors that others read, with checksums that are those of what is in them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ds_ckpt.config import ShardedConfig
from ds_ckpt.formats import read
from ds_ckpt.layout import share_out
from ds_ckpt.sharded import ShardedCheckpoint
from ds_ckpt.storage import folder_at
from ds_ckpt.writing import bytes_of_chunk, write_file
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Box, Chunk, LogicalTensor, Piece, Snapshot
from ds_core.testing.checkpoint import snapshot


def test_safetensors_itself_reads_the_files(tmp_path):
    ShardedCheckpoint(ShardedConfig(writers=1, chunk_bytes=10**6), None).save(
        tmp_path, "tag", snapshot(1), latest=False
    )
    [path] = (tmp_path / "tag").glob("*.safetensors")
    found = load_file(path)
    for piece in snapshot(1).pieces:
        name = f"{piece.of.kind}:{piece.of.name}" + ("" if piece.of.rank is None else f":rank{piece.of.rank}")
        assert torch.equal(found[name], piece.data), name
        assert found[name].dtype == piece.data.dtype


MATRIX = torch.arange(48.0).view(6, 8)
STRIDED = {
    "contiguous": MATRIX,
    "transposed": MATRIX.t().contiguous().t(),
    "every second": torch.arange(192.0).view(12, 16)[::2, ::2],
    "expanded": torch.arange(8.0).expand(6, 8),
    "reversed dims": MATRIX.view(2, 3, 8).permute(2, 0, 1).contiguous().permute(1, 2, 0),
}


@pytest.mark.parametrize("kind", STRIDED)
@pytest.mark.parametrize(("low", "high"), [(0, 48), (0, 1), (5, 30), (47, 48), (16, 32), (3, 3)])
def test_any_interval_of_any_strides(kind, low, high):
    data = STRIDED[kind]
    box = Box((0,) * data.dim(), tuple(data.shape))
    of = LogicalTensor("w", "weight", tuple(data.shape), "float32")
    found = bytes_of_chunk(Piece(of, Chunk.whole(of.shape), data), Chunk(box, low, high - low))
    expected = data.contiguous().view(-1)[low:high].clone()
    assert bytes(found) == expected.numpy().tobytes()


def test_a_piece_of_an_interval_and_of_another_dtype():
    box = Box((0, 0), (6, 8))
    of = LogicalTensor("w", "weight", (6, 8), "bfloat16")
    spread = torch.arange(40.0)[::2]  # one dimension, with a stride
    found = bytes_of_chunk(Piece(of, Chunk(box, 10, 20), spread), Chunk(box, 13, 5))
    expected = spread[3:8].to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert bytes(found) == expected


def test_memory_is_not_copied_where_it_need_not_be():
    of = LogicalTensor("w", "weight", (6, 8), "float32")
    data = MATRIX.clone()
    found = bytes_of_chunk(Piece(of, Chunk.whole(of.shape), data), Chunk(Box((0, 0), (6, 8)), 3, 4))
    data.zero_()
    assert bytes(found) == bytes(16)


def test_no_file_is_ever_written_over(tmp_path):
    (tmp_path / "x.safetensors").write_text("somebody's")
    [parts] = share_out(snapshot(1).pieces, writers=1, chunk_bytes=10**6)
    with pytest.raises(OSError, match="exists"):
        write_file(folder_at(tmp_path), "x.safetensors", parts)
    assert (tmp_path / "x.safetensors").read_text() == "somebody's"


def test_a_write_that_is_cut_short_goes_on(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data[:7])))
    ShardedCheckpoint(None, None).save(tmp_path, "tag", snapshot(1), latest=False)
    monkeypatch.undo()
    assert read(tmp_path / "tag").state["version"] == 1


def test_several_threads_write_at_the_same_time(tmp_path, monkeypatch):
    """Each waits in its first write until the other is there, too."""
    both = threading.Barrier(2, timeout=30)
    write, met = os.write, threading.local()

    def wait_once(descriptor, data):
        if not getattr(met, "yes", False):
            met.yes = True
            both.wait()
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", wait_once)
    engine = ShardedCheckpoint(ShardedConfig(writers=2, chunk_bytes=100), None)
    engine.save(tmp_path, "tag", snapshot(1), latest=False)
    assert len(list((tmp_path / "tag").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("writers", [1, 3])
def test_a_failed_write_says_where_and_leaves_nothing(tmp_path, monkeypatch, writers):
    count = 0

    def full(descriptor, data):
        nonlocal count
        count += 1
        if count > 4:
            raise OSError(28, os.strerror(28))
        return write(descriptor, data)

    engine = ShardedCheckpoint(ShardedConfig(writers=writers, chunk_bytes=100), None)
    engine.save(tmp_path, "tag", snapshot(1), latest=True)
    before = sorted(path.name for path in (tmp_path / "tag").iterdir())
    write = os.write
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        engine.save(tmp_path, "tag", snapshot(2), latest=True)
    monkeypatch.undo()
    assert "rank_00000_" in caught.value.where
    assert sorted(path.name for path in (tmp_path / "tag").iterdir()) == before
    assert read(tmp_path / "tag").state["version"] == 1


def test_everything_is_synced_before_the_manifest_is_there(tmp_path, monkeypatch):
    """What SIGKILL cannot show, since the system keeps what it was given: a power cut takes what was not synced."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor):
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").resolve().name))
        fsync(descriptor)

    def noted_replace(path, target):
        events.append(("rename", target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    engine = ShardedCheckpoint(ShardedConfig(writers=2, chunk_bytes=100), None)
    engine.save(tmp_path, "tag", snapshot(1), latest=True)
    files = sorted(read(tmp_path / "tag").files)
    assert events[0] == ("sync", tmp_path.name), "the tag's folder was made"
    assert sorted(events[1:3]) == [("sync", name) for name in files]
    assert events[3:] == [
        ("sync", "tag"),
        ("sync", "checkpoint.json.tmp"),
        ("rename", "checkpoint.json"),
        ("sync", "tag"),
        ("sync", tmp_path.name),
        ("sync", "latest.tmp"),
        ("rename", "latest"),
        ("sync", tmp_path.name),
    ]


def test_a_dtype_the_format_does_not_have_is_named(tmp_path):
    of = LogicalTensor("freqs", "buffer", (2,), "complex64")
    data = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(CheckpointError, match="complex64") as caught:
        ShardedCheckpoint(None, None).save(
            tmp_path, "tag", Snapshot([Piece(of, Chunk.whole((2,)), data)], {}, {}), latest=False
        )
    assert "freqs" in caught.value.where


def test_pieces_that_do_not_make_a_tensor_are_refused_before_the_commit(tmp_path):
    of = LogicalTensor("w", "weight", (4,), "float32")
    half = Piece(of, Chunk(Box((0,), (4,)), 0, 2), torch.ones(2))
    with pytest.raises(CheckpointError, match=r"weight 'w': its chunks hold 2 of 4"):
        ShardedCheckpoint(None, None).save(tmp_path, "tag", Snapshot([half], {}, {}), latest=True)
    assert not (tmp_path / "tag" / "checkpoint.json").exists()
    assert not (tmp_path / "latest").exists()
