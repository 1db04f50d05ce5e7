"""What two checkpoints differ in, against torch's arithmetic on whole tensors, whatever chunks they are stored in."""

from __future__ import annotations

import math
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from ds_ckpt import formats
from ds_ckpt.casting import BITS
from ds_ckpt.config import ShardedConfig
from ds_ckpt.diff import StateDifference, compare
from ds_ckpt.sharded import ShardedCheckpoint
from ds_core.checkpoint.jsonable import encode
from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Box, Chunk, LogicalTensor, Piece, Snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ds_ckpt.diff import Difference
    from ds_ckpt.stored import Stored

FIXTURES = Path(__file__).with_name("deepspeed-0.19.6")


def cut(of: LogicalTensor, data: torch.Tensor, cuts: Sequence[int]) -> list[Piece]:
    """Return ``data`` as flat intervals that end at ``cuts``."""
    ends = sorted({*(at for at in cuts if 0 < at < of.numel), of.numel})
    box = Box((0,) * len(of.shape), of.shape)
    starts = [0, *ends[:-1]]
    return [
        Piece(of, Chunk(box, start, end - start), data.reshape(-1)[start:end])
        for start, end in zip(starts, ends, strict=True)
    ]


def columns(of: LogicalTensor, data: torch.Tensor, at: int) -> list[Piece]:
    """Return ``data`` as two boxes, left and right of column ``at``."""
    rows, width = of.shape
    return [
        Piece(of, Chunk(Box((0, start), (rows, size)), 0, rows * size), data[:, start : start + size].contiguous())
        for start, size in ((0, at), (at, width - at))
    ]


def save(
    folder: Path,
    tensors: Mapping[tuple[str, str], torch.Tensor],
    *,
    cuts: Sequence[int] = (),
    state: Any = None,
    rank_state: Any = None,
    engine: str = "sharded",
    chunk_bytes: int = 64,
    pieces: Sequence[Piece] | None = None,
) -> Stored:
    found = list(pieces or ())
    for (name, kind), data in tensors.items():
        dtype = str(data.dtype).removeprefix("torch.")
        found += cut(LogicalTensor(name, kind, tuple(data.shape), dtype), data, cuts)
    chosen = {
        "sharded": ShardedCheckpoint(ShardedConfig(chunk_bytes=chunk_bytes), None),
        "plain": PlainCheckpoint(None, None),
    }[engine]
    folder.mkdir(parents=True, exist_ok=True)
    chosen.save(folder, "tag", Snapshot(found, encode(state or {}, "state"), encode(rank_state or {}, "")), latest=True)
    return formats.read(folder / "tag")


def rows(difference: Difference) -> list[tuple[str, str, int]]:
    return [(tensor.of.name, tensor.of.kind, tensor.count) for tensor in difference.tensors]


ONES = {("a", "weight"): torch.ones(7, 5), ("a", "exp_avg"): torch.arange(35.0).reshape(7, 5)}


@pytest.mark.parametrize("read", [False, True])
def test_equal_checksums_are_not_read(read: bool, tmp_path: Path) -> None:
    a, b = (save(tmp_path / name, ONES) for name in "ab")
    found = compare(a, b, read=read)
    assert (found.is_empty, found.compared, found.nbytes) == (True, 2, 280)
    assert found.unread == (0 if read else 280)
    # What is not read is not found damaged.
    file = next(path for path in (tmp_path / "b" / "tag").iterdir() if path.suffix == ".safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    if read:
        with pytest.raises(CheckpointError, match="is damaged: its bytes are not what was written"):
            compare(a, b, read=True)
    else:
        assert compare(a, b).is_empty


@pytest.mark.parametrize("engine", ["sharded", "plain"])
def test_other_chunks_and_formats_hold_the_same(engine: str, tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", ONES), save(tmp_path / "b", ONES, cuts=[3, 4, 21], engine=engine)
    assert compare(a, b).is_empty
    assert compare(b, a).is_empty


def test_what_one_has_alone_and_shapes_and_dtypes(tmp_path: Path) -> None:
    a = save(tmp_path / "a", {**ONES, ("gone", "weight"): torch.ones(2), ("c", "weight"): torch.ones(6)})
    b = save(
        tmp_path / "b",
        {
            ("a", "weight"): torch.ones(7, 5).bfloat16(),
            ("a", "exp_avg"): torch.arange(35.0).reshape(5, 7),
            ("c", "weight"): torch.tensor([1.0, 1, 1, 1, 1, 3]).half(),
            ("new", "buffer"): torch.ones(1),
        },
    )
    found = {tensor.of.name + " " + tensor.of.kind: tensor for tensor in compare(a, b).tensors}
    assert list(found) == ["a weight", "a exp_avg", "gone weight", "c weight", "new buffer"]
    assert found["gone weight"].b is None
    assert found["new buffer"].a is None
    dtypes = found["a weight"]
    assert (dtypes.count, dtypes.of.dtype) == (0, "float32")
    assert dtypes.b is not None
    assert dtypes.b.dtype == "bfloat16"
    assert (found["c weight"].count, found["c weight"].largest) == (1, 2.0)
    assert (found["a exp_avg"].count, found["a exp_avg"].largest) == (0, 0.0)


def test_a_master_is_compared_with_a_weight_where_each_is_alone(tmp_path: Path) -> None:
    w = torch.arange(6.0)
    a = save(tmp_path / "a", {("w", "weight"): w, ("v", "weight"): w.half(), ("v", "master"): w})
    b = save(tmp_path / "b", {("w", "master"): w + 1, ("v", "weight"): w.half()})
    found = compare(a, b)
    assert [(t.of.name, t.a and t.a.kind, t.b and t.b.kind, t.count) for t in found.tensors] == [
        ("w", "weight", "master", 6),
        ("v", "master", None, 0),
    ]
    assert compare(b, a).tensors[0].of.kind == "master"


def test_a_weight_that_one_has_not_is_what_its_master_is_cast_to(tmp_path: Path) -> None:
    w = torch.tensor([1.001, 2.003, 3.007])
    a = save(tmp_path / "a", {("w", "weight"): w.bfloat16(), ("w", "master"): w})
    b = save(tmp_path / "b", {("w", "master"): w})
    for found in (compare(a, b), compare(b, a)):
        assert (found.is_empty, found.compared) == (True, 2)
    c = save(tmp_path / "c", {("w", "master"): w + torch.tensor([0, 0.5, 0])})
    for found in (compare(a, c), compare(c, a)):
        assert sorted((t.of.name, t.count) for t in found.tensors) == [("w", 1), ("w", 1)]


def test_stage_3_of_deepspeed_has_the_weights_of_another_stage() -> None:
    one, three = (formats.read(FIXTURES / f"plain-stage{stage}-world2-bf16" / "global_step4") for stage in (1, 3))
    assert ("l1.weight", "weight", None) in one.tensors
    assert ("l1.weight", "weight", None) not in three.tensors
    for found in (compare(one, three), compare(three, one)):
        assert [tensor for tensor in found.tensors if tensor.a is None or tensor.b is None] == []


def test_an_empty_mapping_is_no_key_where_the_other_has_something_in_it(tmp_path: Path) -> None:
    a = save(tmp_path / "a", {}, state={"client_state": {}, "steps": [], "same": {}, "gone": {}})
    b = save(tmp_path / "b", {}, state={"client_state": {"epoch": 3}, "steps": [7], "same": {}})
    found = [(key.path, key.a, key.b) for key in compare(a, b).state]
    assert sorted(found) == [("client_state.epoch", None, "3"), ("gone", "{}", None), ("steps[0]", None, "7")]
    empty = save(tmp_path / "c", {})
    assert [key.path for key in compare(empty, b).state] == ["client_state.epoch", "steps[0]", "same"]


def test_boxes_against_intervals(tmp_path: Path) -> None:
    of, data = LogicalTensor("w", "weight", (7, 5), "float32"), torch.arange(35.0).reshape(7, 5)
    changed = data.clone()
    changed[4, 3] += 0.5
    a = save(tmp_path / "a", {}, pieces=columns(of, data, 2))
    b = save(tmp_path / "b", {}, pieces=cut(of, changed, [8, 9, 30]))
    [found] = compare(a, b).tensors
    assert (found.count, found.largest, found.relative) == (1, 0.5, 0.5 / 23.5)
    assert compare(a, save(tmp_path / "c", {}, pieces=columns(of, data, 4))).is_empty


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize(
    ("x", "y", "count", "largest", "relative"),
    [
        (NAN, NAN, 0, 0.0, 0.0),
        (0.0, -0.0, 0, 0.0, 0.0),
        (INF, INF, 0, 0.0, 0.0),
        (NAN, 1.0, 1, INF, INF),
        (INF, -INF, 1, INF, INF),
        (INF, 1.0, 1, INF, INF),
        (INF, NAN, 1, INF, INF),
        (1.0, -1.0, 1, 2.0, 2.0),
        (0.0, 4.0, 1, 4.0, 1.0),
    ],
)
def test_numbers(
    dtype: torch.dtype, x: float, y: float, count: int, largest: float, relative: float, tmp_path: Path
) -> None:
    a = save(tmp_path / "a", {("w", "weight"): torch.tensor([1.0, x, 2.0], dtype=dtype)})
    b = save(tmp_path / "b", {("w", "weight"): torch.tensor([1.0, y, 2.0], dtype=dtype)})
    for tolerance in (0.0, 0.125):
        found = compare(a, b, tolerance=tolerance).tensors
        assert [(t.count, t.largest, t.relative) for t in found] == [(count, largest, relative)] * count


def test_whole_numbers_are_compared_exactly(tmp_path: Path) -> None:
    big = 2**62
    a = save(tmp_path / "a", {("n", "buffer"): torch.tensor([big, -big, 3, 0]), ("b", "buffer"): torch.tensor([True])})
    b = save(
        tmp_path / "b", {("n", "buffer"): torch.tensor([big + 1, big, 3, 0]), ("b", "buffer"): torch.tensor([False])}
    )
    n, flag = compare(a, b).tensors
    assert (n.count, n.largest, n.relative) == (2, 2.0**63, 2.0)
    assert (flag.count, flag.largest) == (1, 1.0)


def test_a_tolerance_is_absolute_or_relative(tmp_path: Path) -> None:
    a = save(tmp_path / "a", {("w", "weight"): torch.tensor([0.0, 1000.0, 0.5])}, state={"loss": 1.0, "n": 1})
    b = save(tmp_path / "b", {("w", "weight"): torch.tensor([0.01, 1005.0, 0.7])}, state={"loss": 1.005, "n": 2})
    found = compare(a, b, tolerance=0.01)
    assert rows(found) == [("w", "weight", 1)]
    assert [key.path for key in found.state] == ["n"]
    assert rows(compare(a, b, tolerance=0.5)) == []


def test_state(tmp_path: Path) -> None:
    one = {
        "steps": 3,
        "nan": NAN,
        "list": [1, 2],
        "betas": (0.9, 0.99),
        "by_step": {10: 0.5},
        "gone": {"x": 1},
        "flag": True,
        "t": torch.ones(2),
    }
    two = {
        "steps": 4,
        "nan": NAN,
        "list": [1, 2, 3],
        "betas": (0.9, 0.95),
        "by_step": {10: 0.25},
        "flag": 1,
        "t": torch.zeros(2),
    }
    a = save(tmp_path / "a", {}, state=one, rank_state={"rng": {"seed": 5}})
    b = save(tmp_path / "b", {}, state=two, rank_state={"rng": {"seed": 6}})
    found = compare(a, b)
    assert [(key.path, key.a, key.b) for key in found.state] == [
        ("steps", "3", "4"),
        ("betas[1]", "0.99", "0.95"),
        ("by_step[10]", "0.5", "0.25"),
        ("gone.x", "1", None),
        ("flag", "True", "1"),
        ("t", "tensor [2] 'float32'", "tensor [2] 'float32'"),
        ("list[2]", None, "3"),
        ("rank_state[0].rng.seed", "5", "6"),
    ]
    assert not found.is_empty
    assert compare(a, b, with_state=False).is_empty
    # Of another number of ranks, nobody has a counterpart.
    assert len(compare(a, replace(b, rank_states=b.rank_states * 2)).state) == 7


def test_another_stage_is_no_difference_but_inside_a_window(tmp_path: Path) -> None:
    def of(name: str, **state: Any) -> Stored:
        return save(tmp_path / name, ONES, state={"global_steps": 3, **state})

    zero, two = of("zero", stage=0, in_window=0), of("two", stage=2, in_window=0)
    assert compare(zero, two).is_empty
    assert compare(zero, of("none")).state == (StateDifference("in_window", "0", None),)
    begun = compare(of("one in a window", stage=1, in_window=1), of("two in a window", stage=2, in_window=1))
    assert begun.state == (StateDifference("stage", "1", "2"),)
    assert {key.path for key in compare(zero, of("begun", stage=2, in_window=1)).state} == {"stage", "in_window"}


def test_what_deepspeed_wrote_against_itself_and_others() -> None:
    def of(name: str) -> Stored:
        folder = FIXTURES / name
        return formats.read(folder / (folder / "latest").read_text().strip())

    one, two = of("plain-stage1-world2-fp32"), of("plain-stage2-world2-fp32")
    assert compare(one, one).is_empty
    assert compare(one, one).unread == 0
    again = compare(one, two)
    assert again.compared == len(one.tensors)
    assert "stage" not in {key.path for key in again.state}
    # Neither has a checksum, so every byte was read, through other chunks.
    ranks = compare(of("plain-stage2-world1-fp32"), two, tolerance=1e-3)
    assert [t for t in ranks.tensors if t.a is None or t.b is None or t.a.shape != t.b.shape] == []


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", ONES), save(tmp_path / "b", {**ONES, ("a", "weight"): torch.zeros(7, 5)}, cuts=[11])
    told: list[tuple[int, int]] = []
    compare(a, b, progress=lambda count, total: told.append((count, total)))
    assert {total for _, total in told} == {280}
    assert sum(count for count, _ in told) == 280


def test_memory_is_that_of_a_block(tmp_path: Path) -> None:
    big = torch.zeros(2**22)
    a, b = (
        save(tmp_path / "a", {("w", "weight"): big}, engine="plain"),
        save(tmp_path / "b", {("w", "weight"): big + 1}, chunk_bytes=2**22),
    )
    tracemalloc.start()
    try:
        assert rows(compare(a, b)) == [("w", "weight", 2**22)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Ten arrays of float64 of a block of 2**18 elements; the tensor has 16 MiB, its float64 32.
    assert peak < 10 * 8 * 2**18


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


@st.composite
def two_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of one shape and dtype, of any bits, with some elements in common."""
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    seed = draw(st.integers(0, 2**32 - 1))
    bits = np.random.default_rng(seed).integers(0, 2 if dtype is torch.bool else 256, (2, count * dtype.itemsize))
    x, y = (torch.from_numpy(each.astype("u1")).view(dtype).reshape(shape) for each in bits)
    same = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return x, torch.where(same, x.view(_bits(x)), y.view(_bits(y))).view(dtype)


def _bits(tensor: torch.Tensor) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]


@given(two_tensors(), st.lists(st.integers(1, 100), max_size=3), st.lists(st.integers(1, 100), max_size=3))
@settings(max_examples=60, deadline=None)
def test_agrees_with_torch(pair: tuple[torch.Tensor, torch.Tensor], cuts_a: list[int], cuts_b: list[int]) -> None:
    x, y = pair
    assert set(BITS) >= {str(dtype).removeprefix("torch.") for dtype in DTYPES}
    with tempfile.TemporaryDirectory() as folder:
        a = save(Path(folder) / "a", {("w", "weight"): x}, cuts=cuts_a)
        b = save(Path(folder) / "b", {("w", "weight"): y}, cuts=cuts_b)
        found = compare(a, b).tensors
    if not x.dtype.is_floating_point:
        gaps = [abs(int(p) - int(q)) for p, q in zip(x.flatten(), y.flatten(), strict=True)]
        expected = [(sum(gap > 0 for gap in gaps), float(max(gaps)))] if any(gaps) else []
    else:
        p, q = x.double().flatten(), y.double().flatten()
        differs = (p != q) & ~(p.isnan() & q.isnan())
        gap = (p - q).abs()[differs].nan_to_num(nan=INF, posinf=INF)
        expected = [(int(differs.sum()), float(gap.max()))] if differs.any() else []
    assert [(t.count, t.largest) for t in found] == expected
