"""The two collectives do the same by every primitive, and the table says which is taken."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ds_core.comm import CollectiveWatch
from ds_core.testing.ranks import run_ranks
from ds_zero import collectives

N = 3
BACKENDS = ("gloo", "nccl", "one that nobody has heard of")
SEGMENTS = (0, 1, 5, 1024)
DTYPES = (torch.float32, torch.bfloat16)


def ones_of(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Return whole numbers, so small that a sum of them is exact in any dtype and order."""
    return ((torch.arange(numel) + rank) % 7 - 3).to(dtype)


def both(backend: str) -> tuple[list[str], list[str]]:
    """Return what is wrong, and the collectives that ran."""
    rank, group, device = dist.get_rank(), dist.group.WORLD, torch.device("cpu")
    wrong = []
    with mock.patch.object(collectives, "backend_of", return_value=backend), CollectiveWatch() as seen:
        for segment in SEGMENTS:
            for dtype in DTYPES:
                whole = ones_of(rank, N * segment, dtype)
                received = torch.empty(collectives.received_numel(segment, group, device), dtype=dtype)
                under_way = collectives.reduce_scatter(whole, received, group)
                mine = slice(rank * segment, (rank + 1) * segment)
                expected = sum(ones_of(other, N * segment, dtype) for other in range(N))[mine]
                shard = torch.full((segment,), 2.0, dtype=torch.float32)
                under_way.wait().sum_into(shard, add=True)
                if not torch.equal(shard, expected.float() + 2):
                    wrong.append(f"reduce-scatter of {segment} {dtype}")
                if segment and not torch.equal(whole, ones_of(rank, N * segment, dtype)):
                    wrong.append(f"reduce-scatter of {segment} {dtype} wrote to its input")
                gathered = torch.full((N * segment,), -1.0, dtype=dtype)
                gathered[mine] = expected
                collectives.all_gather(gathered, group).wait()
                if not torch.equal(gathered, sum(ones_of(other, N * segment, dtype) for other in range(N))):
                    wrong.append(f"all-gather of {segment} {dtype}")
    return wrong, sorted({each.name for each in seen.records})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [0, 1, collectives.SUMMED_AT_ONCE, 2 * collectives.SUMMED_AT_ONCE + 3])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_sum_is_rounded_once(dtype: torch.dtype, numel: int, count: int, *, in_place: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    terms = [torch.randn(numel, generator=generator).to(dtype) for _ in range(count)]
    # One term after the other in fp32: with two, torch's own sum in their dtype rounds once, too.
    expected = sum(term.float() for term in terms).to(dtype)
    into = terms[0] if in_place else torch.full((numel,), torch.nan, dtype=dtype)
    collectives.add_up(terms, into)
    assert torch.equal(into, expected)


def received_on_a_gpu() -> int:
    """Return how much is received of a segment of 5 elements in the memory of a GPU, where gloo moves that."""
    with mock.patch.object(collectives, "backend_of", return_value="gloo"):
        return collectives.received_numel(5, dist.group.WORLD, torch.device("cuda"))


def backends_by_device() -> tuple[str, str, str]:
    """Return which backend is found for tensors of a CPU and of another device, and in a group of no name."""
    found = [collectives.backend_of(dist.group.WORLD, torch.device(kind)) for kind in ("cpu", "xpu")]
    dist.destroy_process_group()
    # Without a backend torch takes one for each device, and calls the group's own "undefined".
    dist.init_process_group()
    assert dist.get_backend() != "gloo"
    return (*found, collectives.backend_of(dist.group.WORLD, torch.device("cpu")))


@pytest.fixture(scope="module")
def ran() -> list[list[tuple]]:
    return run_ranks([*(partial(both, backend) for backend in BACKENDS), received_on_a_gpu, backends_by_device], N)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backends_primitives_give_the_same(ran: list[list[tuple]], backend: str) -> None:
    of_segments = ["recv", "send"]
    of_ring = ["all_gather_into_tensor", "reduce_scatter_tensor"]
    for wrong, names in ran[BACKENDS.index(backend)]:
        assert wrong == []
        assert names == (of_segments if backend == "gloo" else of_ring)


def test_the_backend_is_that_of_the_device(ran: list[list[tuple]]) -> None:
    assert ran[-1] == [("gloo", "", "gloo")] * N


def test_gloo_sends_segments_only_from_cpu_memory(ran: list[list[tuple]]) -> None:
    assert ran[-2] == [5] * N, "one segment, as reduce_scatter_tensor returns it"


def test_the_table() -> None:
    assert {"gloo": (collectives.SEGMENTS, collectives.SEGMENTS)} == collectives.TABLE
    assert collectives.primitives("gloo") == collectives.TABLE["gloo"]
    assert collectives.primitives("nccl") == collectives.OTHERS
