"""What is said of a damaged file where the file itself goes on changing, or is large."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import pytest
import torch

from ds_ckpt import verify
from ds_ckpt.config import ShardedConfig
from ds_ckpt.formats import read
from ds_ckpt.sharded import ShardedCheckpoint
from ds_ckpt.verify import find_damage
from ds_core.interfaces.logical import Chunk, LogicalTensor, Piece, Snapshot

if TYPE_CHECKING:
    from pathlib import Path

    from ds_ckpt.stored import Stored


@pytest.fixture
def damaged(tmp_path) -> tuple[Path, Stored]:
    """A file with a flipped byte at its end, and the checkpoint that it is all of."""
    pieces = []
    for name in ("a", "b"):
        of = LogicalTensor(name, "weight", (3, 1001), "float32")
        pieces.append(Piece(of, Chunk.whole(of.shape), torch.randn(of.shape)))
    ShardedCheckpoint(ShardedConfig(writers=1), None).save(tmp_path, "tag", Snapshot(pieces, {}, {}), latest=False)
    (path,) = (tmp_path / "tag").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path, read(tmp_path / "tag")


def found(stored: Stored) -> list[str]:
    return [damage.what for damage in find_damage(stored, lambda nbytes: None)]


@pytest.mark.parametrize("block", [2**25, 12012, 5000, 7])
def test_a_damaged_part_is_found_in_blocks(damaged, monkeypatch, block):
    monkeypatch.setattr(verify, "_READ_BYTES", block)
    assert found(damaged[1]) == ["weight 'b'"]


def test_a_large_damaged_chunk_is_not_held_in_memory(damaged, monkeypatch):
    monkeypatch.setattr(verify, "_READ_BYTES", 100)
    file = damaged[1].folder.open(damaged[0].name)
    tracemalloc.start()
    try:
        verify._checksum_at(file, 0, 24000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12000


def test_a_file_that_is_gone_when_it_is_looked_into(damaged, monkeypatch):
    path, stored = damaged
    checksum_of = verify._checksum_of

    def then_removed(*args):
        summed = checksum_of(*args)
        path.unlink()
        return summed

    monkeypatch.setattr(verify, "_checksum_of", then_removed)
    assert found(stored) == ["a file of the checkpoint is missing"]
