"""Values and chunks that cannot be believed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_ckpt.checks import Field, check_chunks, parse_json
from ds_ckpt.stored import StoredChunk, StoredTensor
from ds_core.checkpoint import coverage
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Box, Chunk, LogicalTensor

# -- values -----------------------------------------------------------------------------------------------------------


def field(value) -> Field:
    return Field(value, "tensors[3]", Path("/folder"), "checkpoint.json")


@pytest.mark.parametrize(
    "data", [b"[" * 10**6, b'{"a":' * 10**6, b"{", b"", b"\xff", b"1" * 10**5, b'"\x00"', "{}".encode("utf-16")]
)
def test_what_is_not_json_is_refused(data, tmp_path):
    with pytest.raises(CheckpointError, match="is not JSON"):
        parse_json(data, tmp_path, "file")


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (lambda f: f.whole(), -1),
        (lambda f: f.whole(), True),
        (lambda f: f.whole(), 1.0),
        (lambda f: f.whole(), "1"),
        (lambda f: f.whole(), 2**70),
        (lambda f: f.whole(0, 5), 6),
        (lambda f: f.text(), 5),
        (lambda f: f.text(), "x" * 5000),
        (lambda f: f.text(), "\udc00"),
        (lambda f: f.list(), {}),
        (lambda f: f.list(2), [1]),
        (lambda f: f.object(), []),
        (lambda f: f["key"], {}),
        (lambda f: f["key"], [1]),
        (lambda f: f.get("key"), 5),
        (lambda f: f.dtype(), "complex64"),
        (lambda f: f.dtype(), ["float32"]),
        (lambda f: f.shape(), [10**12, 10**12]),
        (lambda f: f.shape(), [1] * 65),
        (lambda f: f.shape(), [-1]),
        (lambda f: f.shape(), 5),
        (lambda f: f.chunk((4, 4)), [None, None, 0, 17]),
        (lambda f: f.chunk((4, 4)), [None, None, 17, 0]),
        (lambda f: f.chunk((4, 4)), [[0, 0], [5, 4], 0, 1]),
        (lambda f: f.chunk((4, 4)), [[0], [4], 0, 1]),
        (lambda f: f.chunk((4, 4)), [[0, 0], None, 0, 1]),
        (lambda f: f.chunk((4, 4)), [[-1, 0], [1, 1], 0, 1]),
        (lambda f: f.chunk((4, 4)), [0, 1]),
    ],
)
def test_a_wrong_value_is_refused_with_file_and_field(read, value):
    with pytest.raises(CheckpointError) as caught:
        read(field(value))
    assert "tensors[3]" in caught.value.what
    assert caught.value.where == "/folder/checkpoint.json"
    assert len(str(caught.value)) < 600


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_any_value_is_either_right_or_refused(value):
    for read in (
        lambda f: f.whole(),
        lambda f: f.text(),
        lambda f: f.list(),
        lambda f: f.object(),
        lambda f: f.shape(),
        lambda f: f.dtype(),
        lambda f: f.chunk((3, 2)),
    ):
        try:
            read(field(value))
        except CheckpointError as error:
            message = str(error)
            assert len(message) < 1000


# -- chunks -----------------------------------------------------------------------------------------------------------


def stored(shape, chunks, *, dtype="float32", file="a", packed=True) -> StoredTensor:
    rows, at = [], 0
    for chunk in chunks:
        rows.append(StoredChunk(chunk, file, at if packed else 0, 4 * chunk.length))
        at += 4 * chunk.length
    return StoredTensor(LogicalTensor("layer.w", "exp_avg", shape, dtype), tuple(rows))


def check(*tensors, sizes=None) -> None:
    check_chunks(tensors, {"a": 4000} if sizes is None else sizes, Path("/folder"), None)


def columns(*edges) -> list[Chunk]:
    return [Chunk(Box((0, low), (4, high - low)), 0, 4 * (high - low)) for low, high in itertools.pairwise(edges)]


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ((4, 6), [Chunk.whole((4, 6))]),
        ((), [Chunk.whole(())]),
        ((0, 4), [Chunk.whole((0, 4))]),
        ((0, 4), [Chunk.whole((0, 4))] * 2),
        ((4, 6), [Chunk(Box((0, 0), (4, 6)), 0, 11), Chunk(Box((0, 0), (4, 6)), 11, 13)]),
        ((4, 6), columns(0, 1, 4, 6)),
        ((4, 6), [*columns(0, 3), Chunk(Box((0, 3), (4, 3)), 0, 5), Chunk(Box((0, 3), (4, 3)), 5, 7)]),
    ],
)
def test_chunks_that_hold_everything_once(shape, chunks):
    check(stored(shape, chunks))


@pytest.mark.parametrize(
    ("chunks", "what"),
    [
        ([], "no chunk"),
        ([Chunk(Box((0, 0), (4, 6)), 0, 23)], "23 of 24"),
        ([Chunk.whole((4, 6))] * 2, "48 of 24"),
        ([Chunk(Box((0, 0), (4, 6)), 0, 12)] * 2, "overlap"),
        ([Chunk(Box((0, 0), (4, 6)), 0, 11), Chunk(Box((0, 0), (4, 6)), 10, 13)], "overlap"),
        ([*columns(0, 3), *columns(2, 5)], "overlap"),
        ([*columns(0, 3), Chunk(Box((0, 0), (2, 6)), 0, 12)], "overlap"),
    ],
)
def test_chunks_that_do_not(chunks, what):
    with pytest.raises(CheckpointError, match=what) as caught:
        check(stored((4, 6), chunks))
    assert "exp_avg 'layer.w'" in caught.value.what


def test_chunks_and_files():
    whole = [Chunk.whole((4, 6))]
    with pytest.raises(CheckpointError, match="behind the end"):
        check(stored((4, 6), whole), sizes={"a": 95})
    with pytest.raises(CheckpointError, match="not one of the checkpoint's"):
        check(stored((4, 6), whole, file="b"))
    with pytest.raises(CheckpointError, match="has 96 bytes"):
        check(stored((4, 6), whole, dtype="float64"))
    with pytest.raises(CheckpointError, match="share bytes of a"):
        check(stored((4, 6), columns(0, 3, 6), packed=False))


def test_interleaving_costs_a_bounded_time(monkeypatch):
    monkeypatch.setattr(coverage, "MAX_COMPARISONS", 100)
    with pytest.raises(CheckpointError, match="interleaved"):
        check(stored((4, 30), columns(*range(31))))
    check(stored((30,), [Chunk(Box((0,), (30,)), at, 1) for at in range(30)]))


@given(st.data())
def test_a_cut_is_right_and_any_change_of_it_is_not(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    whole = Chunk.whole(shape)
    edges = sorted({0, whole.length, *data.draw(st.lists(st.integers(0, whole.length), max_size=4))})
    chunks = [Chunk(whole.box, low, high - low) for low, high in itertools.pairwise(edges)]
    check(stored(shape, chunks))
    victim = data.draw(st.integers(0, len(chunks) - 1))
    old = chunks[victim]
    start = data.draw(st.integers(0, whole.length - old.length))
    changed = Chunk(old.box, start, old.length)
    if changed != old:
        with pytest.raises(CheckpointError, match=r"overlap"):
            check(stored(shape, [*chunks[:victim], changed, *chunks[victim + 1 :]]))
