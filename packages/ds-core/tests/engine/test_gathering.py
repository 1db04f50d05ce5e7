"""Weights whole on rank 0 from pieces of any cut, one at a time; whatever a rank meets, none waits for it."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_core.engine import gathering as gathering_module
from ds_core.engine.gathering import Gathering, on_rank_0
from ds_core.errors import CheckpointError, DsError
from ds_core.interfaces.logical import BUFFER, MASTER, WEIGHT, Box, Chunk, LogicalTensor, Piece
from ds_core.testing.memory import LiveStorage
from ds_core.testing.ranks import expect_rank_errors, run_ranks


def values(name: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name + kind)))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 10).to(dtype)


def of(name: str, kind: str, *shape: int, dtype: str = "float32") -> tuple[LogicalTensor, torch.Tensor]:
    full = values(name, kind, shape, getattr(torch, dtype))
    return LogicalTensor(name, kind, shape, dtype), full


def flat_pieces(tensor: LogicalTensor, full: torch.Tensor, world_size: int) -> list[Piece]:
    """Cut into equal intervals, as ZeRO does; some ranks may have none."""
    each = -(-full.numel() // world_size)
    found = []
    for rank in range(world_size):
        start, end = min(rank * each, full.numel()), min((rank + 1) * each, full.numel())
        if end > start:
            chunk = Chunk(Chunk.whole(tensor.shape).box, start, end - start)
            found.append(Piece(tensor, chunk, full.reshape(-1)[start:end].clone(), rank))
    return found


def column_pieces(tensor: LogicalTensor, full: torch.Tensor, world_size: int) -> list[Piece]:
    """Cut into boxes of columns, as tensor parallelism does."""
    found = []
    for rank, part in enumerate(full.tensor_split(world_size, dim=1)):
        start = sum(p.shape[1] for p in full.tensor_split(world_size, dim=1)[:rank])
        box = Box((0, start), tuple(part.shape))
        found.append(Piece(tensor, Chunk(box, 0, math.prod(part.shape)), part, rank))
    return found


def replicated(tensor: LogicalTensor, full: torch.Tensor, writer: int) -> list[Piece]:
    return [Piece(tensor, Chunk.whole(tensor.shape), full, writer)]


def gather(pieces: list[Piece], **options: Any) -> Gathering:
    settings = {"dtype": None, "stored": {}, "exclude": (), "where": "here", **options}
    return Gathering(pieces, dist.group.WORLD, torch.device("cpu"), **settings)


def collect_all(gathering: Gathering) -> dict[str, torch.Tensor]:
    found = {}
    on_rank_0(gathering, gathering.entries, lambda take: found.update({e.name: take(e) for e in gathering.entries}))
    return found


def every_cut() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tensors = {
        "flat": (of("flat", WEIGHT, 7, 5), flat_pieces),
        "small": (of("small", WEIGHT, 1, 2), flat_pieces),
        "columns": (of("columns", WEIGHT, 4, 7), column_pieces),
        "half": (of("half", WEIGHT, 9, dtype="bfloat16"), flat_pieces),
        "count": (of("count", BUFFER, dtype="int64"), partial(lambda t, f, n: replicated(t, f, 0))),
        "scalar": (of("scalar", WEIGHT), partial(lambda t, f, n: replicated(t, f, n - 1))),
        "none": (of("none", WEIGHT, 0, 3), partial(lambda t, f, n: replicated(t, f, n - 1))),
        "strided": (of("strided", WEIGHT, 3, 4), partial(lambda t, f, n: replicated(t, f.t().contiguous().t(), 0))),
    }
    pieces, expected = [], {}
    for name, ((tensor, full), cut) in tensors.items():
        own = [p for p in cut(tensor, full, world_size) if p.writer == rank or p.chunk == Chunk.whole(tensor.shape)]
        pieces += own
        expected[name] = full
    gathering = gather(pieces)
    assert {entry.name: (entry.dtype, entry.shape) for entry in gathering.entries} == {
        name: (str(full.dtype).removeprefix("torch."), tuple(full.shape)) for name, full in expected.items()
    }
    found = collect_all(gathering)
    assert gathering.agree() == []
    assert found.keys() == (expected.keys() if rank == 0 else set())
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name


def casts() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    weight, low = of("w", WEIGHT, 5, 3, dtype="bfloat16")
    master, full = of("w", MASTER, 5, 3)
    frozen, of_frozen = of("frozen", WEIGHT, 4, dtype="bfloat16")
    count, counted = of("count", BUFFER, 2, dtype="int32")
    only, of_only = of("only", MASTER, 6)
    buffer = [Piece(count, Chunk.whole((2,)), counted, 0)]
    sharded = [(weight, low), (master, full), (frozen, of_frozen), (only, of_only)]
    pieces = [p for tensor, data in sharded for p in flat_pieces(tensor, data, world_size) if p.writer == rank]
    stored = {"only": torch.float16}
    for dtype, expected in (
        (None, {"w": low, "frozen": of_frozen, "count": counted, "only": of_only.half()}),
        (torch.float32, {"w": full, "frozen": of_frozen.float(), "count": counted, "only": of_only}),
        (torch.float16, {"w": full.half(), "frozen": of_frozen.half(), "count": counted, "only": of_only.half()}),
    ):
        found = collect_all(gather([*pieces, *buffer], dtype=dtype, stored=stored))
        if rank == 0:
            assert found.keys() == expected.keys()
            for name, value in found.items():
                assert value.dtype == expected[name].dtype, (name, dtype)
                assert torch.equal(value, expected[name]), (name, dtype)
    left = collect_all(gather([*pieces, *buffer], exclude=["frozen"]))
    assert left.keys() == ({"w", "count", "only"} if rank == 0 else set())


def values_beyond_a_dtype_are_told() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tensor, full = of("large", WEIGHT, 6)
    full[-1] = 1e5  # on the last rank
    infinite, already = of("infinite", WEIGHT, 6)
    already[0] = math.inf
    pieces = [p for t, f in ((tensor, full), (infinite, already)) for p in flat_pieces(t, f, world_size)]
    gathering = gather([p for p in pieces if p.writer == rank], dtype=torch.float16)
    found = collect_all(gathering)
    assert gathering.agree() == ["large"]
    assert rank or torch.equal(found["large"], full.half())


class BrokenData:
    """A piece whose data cannot be had."""

    def detach(self) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory on the device")


def failures_reach_all() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tensors = [of(f"w{number}", WEIGHT, 50) for number in range(4)]
    pieces = [p for tensor, full in tensors for p in flat_pieces(tensor, full, world_size) if p.writer == rank]

    broken = [Piece(p.of, p.chunk, BrokenData(), rank) if p.of.name == "w1" and rank == 1 else p for p in pieces]
    with pytest.raises(RuntimeError if rank == 1 else DsError, match="no memory on the device"):
        collect_all(gather(broken))

    def disk_full(take: Any) -> None:
        take(gathering.entries[0])
        raise CheckpointError("the disk is full")

    gathering = gather(pieces)
    with pytest.raises(CheckpointError, match="the disk is full" if rank == 0 else "rank 0 failed: the disk is full"):
        on_rank_0(gathering, gathering.entries, disk_full)
    # And the group is in step afterwards.
    assert len(collect_all(gather(pieces))) == (4 if rank == 0 else 0)

    with pytest.raises(CheckpointError, match="arguments: rank 1 'of rank 1', rank 0 'of rank 0'"):
        gather(pieces, arguments=f"of rank {min(rank, 1)}")
    lost = [p for p in pieces if not (rank == 1 and p.of.name == "w2")]
    with pytest.raises(CheckpointError, match=r"the ranks hold 25 of 50 elements of weight 'w2'"):
        gather(lost)


def _break(patch: pytest.MonkeyPatch, name: str, when: Any) -> None:
    """Make ``torch.name`` run out of memory for what ``when`` is true of its arguments."""
    original = getattr(torch, name)

    def full(*args: Any, **options: Any) -> Any:
        if when(*args, **options):
            raise torch.OutOfMemoryError(f"no memory for {name}")
        return original(*args, **options)

    patch.setattr(torch, name, full)


def memory_ends_between_announcing_and_sending() -> None:
    """On either side, in the midst of an export; the buffer is smaller than a chunk."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    flat, columns = of("flat", WEIGHT, 50), of("columns", WEIGHT, 6, 7)
    pieces = [p for p in flat_pieces(*flat, world_size) + column_pieces(*columns, world_size) if p.writer == rank]
    broken = [Piece(p.of, p.chunk, BrokenData(), rank) if rank == 1 else p for p in pieces]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering_module, "BLOCK_BYTES", 16)
        gathering = gather(broken)
        _break(patch, "zeros", lambda *shape, dtype, **rest: rank == 1 and dtype == torch.uint8)
        with pytest.raises(RuntimeError if rank == 1 else DsError, match="no memory on the device"):
            collect_all(gathering)
    for shape in ((50,), (6, 7), 18):  # a whole tensor, and the chunk of a box
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gathering_module, "BLOCK_BYTES", 16)
            gathering = gather(pieces)
            _break(patch, "empty", lambda wanted, shape=shape, **rest: rank == 0 and wanted == shape)
            with pytest.raises(RuntimeError if rank == 0 else DsError, match="no memory for empty"):
                collect_all(gathering)
    with pytest.MonkeyPatch.context() as patch:
        _break(patch, "zeros", lambda *shape, dtype, **rest: rank == 1 and dtype == torch.uint8)
        with pytest.raises(RuntimeError if rank == 1 else DsError, match="no memory for zeros"):
            gather(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering_module, "BLOCK_BYTES", 16)
        found = collect_all(gather(pieces))
    for tensor, full in (flat, columns) if rank == 0 else ():
        assert torch.equal(found[tensor.name], full)


def rank_1_dies_while_sending() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tensors = [of(f"w{number}", WEIGHT, 50) for number in range(3)]
    gathering = gather([p for t, full in tensors for p in flat_pieces(t, full, world_size) if p.writer == rank])
    if rank == 1:
        gathering.collect("w0")
        os._exit(3)
    collect_all(gathering)


def rank_0_holds_one_tensor() -> tuple[int, int]:
    """Return the peak of live storage on rank 0 while it takes tensors and drops them, and the size of one."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tensors = [of(f"w{number}", MASTER, 100, 64) for number in range(6)]
    pieces = [p for tensor, full in tensors for p in flat_pieces(tensor, full, world_size) if p.writer == rank]
    gathering = gather(pieces, dtype=torch.bfloat16)

    def drop(take: Any) -> None:
        for entry in gathering.entries:
            take(entry)

    with LiveStorage() as live:
        on_rank_0(gathering, gathering.entries, drop)
    return live.peak_bytes, 100 * 64 * 2


CASES = [every_cut, casts, values_beyond_a_dtype_are_told]


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_cut_dtype_and_kind(world_size):
    run_ranks(CASES, world_size, timeout_s=30)


def test_failures_and_memory_on_two_ranks():
    cases = [*CASES, failures_reach_all, memory_ends_between_announcing_and_sending, rank_0_holds_one_tensor]
    results = run_ranks(cases, 2, timeout_s=30)
    for peak, size in results[-1]:
        # The tensor, and this rank's own half in the new dtype; the other half is received into its place.
        assert size // 2 <= peak <= 1.5 * size + 4096


def test_a_rank_that_dies_while_it_sends_is_told():
    errors = expect_rank_errors(rank_1_dies_while_sending, 2, timeout_s=20)
    assert errors[1] == "ExitCode: 3"
    assert errors[0].startswith("CommError: the weights cannot be gathered, a rank is gone")
