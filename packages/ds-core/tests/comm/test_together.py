"""Ranks agree: one fails, all fail with its reason; rank 0's tensors reach everybody, whatever they look like."""

from __future__ import annotations

import os

import pytest
import torch

from ds_core import comm
from ds_core.comm import all_or_none, broadcast_tensors, raise_together, same_on_all_ranks, values_of_ranks
from ds_core.comm.together import BROADCAST_BYTES
from ds_core.errors import CheckpointError, CommError, DsError
from ds_core.testing.ranks import expect_rank_errors, run_ranks

WORLD_SIZE = 3


def told(error: Exception | None) -> tuple[str, str] | None:
    """Return the class and text of what ``raise_together`` raises here, None if nothing."""
    try:
        raise_together(error, torch.distributed.group.WORLD)
    except Exception as caught:
        raised = caught
    else:
        return None
    assert raised is error or error is None, "a rank's own error is raised as it is"
    return type(raised).__name__, str(raised)


def nobody_fails() -> object:
    return told(None)


def rank_1_fails() -> object:
    return told(CheckpointError("no space", where="/there", fix="free some") if comm.get_rank() == 1 else None)


def ranks_1_and_2_fail() -> object:
    return told(None if comm.get_rank() == 0 else CheckpointError(f"reason {comm.get_rank()}"))


def rank_2_fails_with_an_error_of_pythons() -> object:
    return told(ZeroDivisionError("division by zero") if comm.get_rank() == 2 else None)


def fail_on_rank_1() -> int:
    if comm.get_rank() == 1:
        raise CheckpointError("no space")
    return comm.get_rank()


def all_or_none_of_them() -> tuple[int, str, list[int]]:
    world = torch.distributed.group.WORLD
    with pytest.raises(CheckpointError) as caught:
        all_or_none(fail_on_rank_1, world)
    return all_or_none(comm.get_rank, world), caught.value.what, values_of_ranks(comm.get_rank(), world)


def die_on_rank_1() -> None:
    """Rank 1 dies; the others are told in our words, or of their own failure."""
    world = torch.distributed.group.WORLD
    if comm.get_rank() == 1:
        os._exit(3)
    own = CheckpointError("mine") if comm.get_rank() == 2 else None
    raise_together(own, world)


class UnpicklableError(Exception):
    def __reduce__(self):
        raise TypeError("holds a lock")


def rank_0_fails_with_what_cannot_travel() -> object:
    return told(UnpicklableError("odd") if comm.get_rank() == 0 else None)


def compare() -> list[dict[int, object]]:
    rank, world = comm.get_rank(), torch.distributed.group.WORLD
    return [
        same_on_all_ranks("equal", world),
        same_on_all_ranks(rank, world),
        same_on_all_ranks({"a": rank == 1}, world),
        same_on_all_ranks(None if rank == 2 else "x", world),
    ]


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
)


def odd_tensors(seed: int) -> list[torch.Tensor]:
    """Return tensors whose values depend on ``seed``, one after another of other dtypes, shapes and strides."""
    generator = torch.Generator().manual_seed(seed)

    def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randint(0, 100, shape, generator=generator).to(dtype)

    found = []
    for dtype in DTYPES:
        found += [values(dtype, 5, 3), values(dtype), values(dtype, 0, 2), values(dtype, 4, 6).t()]
        found += [values(dtype, 8, 6)[::2, 1::2], torch.nn.Parameter(values(dtype, 7), requires_grad=False)]
    large = BROADCAST_BYTES // 4 + 5
    found += [values(torch.float32, 11), values(torch.float32, large), values(torch.float32, large // 2)]
    found += [values(torch.float32, 2, large // 2).t(), values(torch.float32, 3)]
    found.append(torch.nn.Parameter(values(torch.float32, 4)))  # requires grad, and is written to in place
    return found


def broadcast() -> list[int]:
    """Return the places of the tensors that do not have rank 0's values afterwards."""
    tensors, expected = odd_tensors(comm.get_rank()), odd_tensors(0)
    pointers = [tensor.data_ptr() for tensor in tensors]
    group = torch.distributed.group.WORLD
    assert group is not None
    broadcast_tensors(tensors, group)
    broadcast_tensors([], group)
    assert pointers == [tensor.data_ptr() for tensor in tensors], "in place"
    assert all(tensor.grad_fn is None for tensor in tensors)
    return [
        place
        for place, pair in enumerate(zip(tensors, expected, strict=True))
        if not torch.equal(*[tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor for tensor in pair])
    ]


def few_messages() -> int:
    """Return how many collectives a hundred small tensors need."""
    count = 0
    original = torch.distributed.broadcast

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    torch.distributed.broadcast = counted
    try:
        assert torch.distributed.group.WORLD is not None
        broadcast_tensors([torch.ones(10) for _ in range(100)], torch.distributed.group.WORLD)
    finally:
        torch.distributed.broadcast = original
    return count


FUNCTIONS = (
    nobody_fails,
    rank_1_fails,
    ranks_1_and_2_fail,
    rank_2_fails_with_an_error_of_pythons,
    rank_0_fails_with_what_cannot_travel,
    all_or_none_of_them,
    compare,
    broadcast,
    few_messages,
)


@pytest.fixture(scope="module")
def results() -> dict[str, list]:
    """What each function returned on each rank, of one spawn."""
    found = run_ranks(FUNCTIONS, WORLD_SIZE)
    return {function.__name__: of_ranks for function, of_ranks in zip(FUNCTIONS, found, strict=True)}


def test_without_an_error_nothing_is_raised(results):
    assert results["nobody_fails"] == [None] * 3


def test_the_error_of_one_rank_is_raised_on_all(results):
    others = ("CheckpointError", "rank 1 failed: no space\n  where: /there\n  fix: free some")
    own = ("CheckpointError", "no space\n  where: /there\n  fix: free some")
    assert results["rank_1_fails"] == [others, own, others]


def test_of_several_errors_the_others_hear_the_first(results):
    first, *own = results["ranks_1_and_2_fail"]
    assert first == ("CheckpointError", "rank 1 failed: reason 1")
    assert own == [("CheckpointError", "reason 1"), ("CheckpointError", "reason 2")]


def test_an_error_that_is_none_of_ours_travels_as_text(results):
    others = ("CommError", "rank 2 failed: ZeroDivisionError: division by zero")
    own = ("ZeroDivisionError", "division by zero")
    assert results["rank_2_fails_with_an_error_of_pythons"] == [others, others, own]
    other = ("CommError", "rank 0 failed: UnpicklableError: odd")
    assert results["rank_0_fails_with_what_cannot_travel"] == [("UnpicklableError", "odd"), other, other]


def test_work_of_all_ranks_is_done_or_fails_on_all(results):
    others = "rank 1 failed: no space"
    assert results["all_or_none_of_them"] == [
        (0, others, [0, 1, 2]),
        (1, "no space", [0, 1, 2]),
        (2, others, [0, 1, 2]),
    ]


def test_a_rank_that_is_gone_is_told():
    errors = expect_rank_errors(die_on_rank_1, WORLD_SIZE, timeout_s=20)
    assert errors[0].startswith("CommError: the ranks cannot reach each other, one of them is gone: ")
    assert errors[1] == "ExitCode: 3"
    assert errors[2] == "CheckpointError: mine"


def test_ranks_whose_value_differs_are_named_with_it(results):
    for of_rank in results["compare"]:
        assert of_rank == [{}, {1: 1, 2: 2}, {1: {"a": True}}, {2: None}]


def test_broadcast_reaches_every_kind_of_tensor(results):
    assert results["broadcast"] == [[], [], []]


def test_small_tensors_travel_together(results):
    assert results["few_messages"] == [1] * 3


def test_one_process_alone_needs_no_group():
    raise_together(None, None)
    error = CommError("mine")
    with pytest.raises(CommError) as caught:
        raise_together(error, None)
    assert caught.value is error
    assert same_on_all_ranks(object(), None) == {}
    assert (values_of_ranks(3, None), all_or_none(lambda: 4, None)) == ([3], 4)
    assert issubclass(CommError, DsError)
