"""How a rank's pieces are cut and shared out to files."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_ckpt.checks import ITEM_BYTES
from ds_ckpt.layout import share_out
from ds_core.interfaces.logical import Box, Chunk, LogicalTensor, Piece

EMPTY = torch.empty(0)
MIB = 2**20


def piece(index: int, numel: int, dtype: str = "float32") -> Piece:
    of = LogicalTensor(f"w{index}", "weight", (numel,), dtype)
    return Piece(of, Chunk.whole((numel,)), EMPTY)


def size(parts) -> int:
    return sum(part.nbytes for part in parts)


@given(
    st.lists(st.tuples(st.integers(0, 500), st.sampled_from(sorted(ITEM_BYTES))), max_size=12),
    st.integers(1, 4),
    st.integers(1, 300),
)
def test_every_element_is_in_one_part(sizes, writers, chunk_bytes):
    pieces = [piece(index, numel, dtype) for index, (numel, dtype) in enumerate(sizes)]
    shares = share_out(pieces, writers=writers, chunk_bytes=chunk_bytes)
    assert len(shares) <= writers
    assert all(shares)
    for given_piece in pieces:
        parts = [part.chunk for share in shares for part in share if part.piece is given_piece]
        parts.sort(key=lambda chunk: chunk.offset)
        assert parts
        assert parts[0].offset == 0
        assert all(a.offset + a.length == b.offset for a, b in itertools.pairwise(parts))
        assert sum(part.length for part in parts) == given_piece.chunk.length
        item_bytes = ITEM_BYTES[given_piece.of.dtype]
        assert all(part.length * item_bytes <= max(chunk_bytes, item_bytes) for part in parts)
    for share in shares:
        at = 0
        for part in share:
            assert at % ITEM_BYTES[part.piece.of.dtype] == 0, "aligned"
            at += part.nbytes


def test_an_interval_is_cut_inside_its_box():
    of = LogicalTensor("w", "weight", (10, 10), "float32")
    box = Box((2, 0), (5, 10))
    [share] = share_out([Piece(of, Chunk(box, 7, 30), EMPTY)], writers=1, chunk_bytes=60)
    assert sorted((part.chunk.offset, part.chunk.length) for part in share) == [(7, 15), (22, 15)]
    assert {part.chunk.box for part in share} == {box}


def test_one_large_tensor_fills_all_files_alike():
    shares = share_out([piece(0, 100 * MIB), piece(1, MIB)], writers=3, chunk_bytes=64 * MIB)
    assert len(shares) == 3
    assert max(map(size, shares)) < 1.15 * min(map(size, shares))


@pytest.mark.parametrize(("nbytes", "files"), [(0, 1), (1000, 1), (64 * MIB, 1), (64 * MIB + 4, 2), (200 * MIB, 3)])
def test_little_data_needs_few_files(nbytes, files):
    assert len(share_out([piece(0, nbytes // 4)], writers=3, chunk_bytes=64 * MIB)) == files


def test_small_tensors_are_not_cut():
    shares = share_out([piece(index, 1000 + index) for index in range(50)], writers=2, chunk_bytes=100_000)
    assert sorted(len({part.piece.of.name for part in share}) for share in shares) == [25, 25]
    assert sum(map(len, shares)) == 50


def test_nothing_to_write_is_no_file():
    assert share_out([], writers=2, chunk_bytes=64) == []
