"""Parts that other projects import."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from ds_activation import internals, settings
from ds_activation.internals import CheckpointFunction, detach_variable, extract_tensors, merge_tensors
from ds_core.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    settings.forget()


def of_rank(rank: int, size: int) -> Any:
    return SimpleNamespace(
        get_model_parallel_rank=lambda: rank,
        get_model_parallel_world_size=lambda: size,
        get_model_parallel_group=lambda: None,
    )


def test_the_function_by_its_class() -> None:
    x, outputs = torch.ones(2, requires_grad=True), []
    runs: list[int] = []

    def function(x: Tensor, factor: int) -> tuple[Tensor, None]:
        runs.append(1)
        return (x * factor).exp(), None

    out, nothing = CheckpointFunction.apply(function, outputs, x, 2)
    assert outputs == [out, nothing]
    out.sum().backward()
    assert len(runs) == 2
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * torch.full((2,), 2.0).exp())
    one: list[Any] = []
    assert CheckpointFunction.apply(nn.Identity(), one, x) is x
    assert one == [x]


def test_detach_variable() -> None:
    x = torch.ones(2, requires_grad=True) * 2
    mask = torch.ones(2, dtype=torch.int64)
    detached, same, none = detach_variable((x, mask, None), device="cpu")
    assert detached.requires_grad
    assert detached.is_leaf
    assert detached.data_ptr() == x.data_ptr()
    assert not same.requires_grad
    assert none is None
    with pytest.raises(RuntimeError, match="takes a tuple, got a list"):
        detach_variable([x])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [tuple, list])
def test_tensors_are_taken_out_and_put_back(kind: type) -> None:
    a, b = torch.ones(1), torch.ones(2)
    objects = kind([None, a, "text", b])
    tensors, others, flags = parts = extract_tensors(objects)
    assert parts == (kind([a, b]), kind([None, "text"]), kind([False, True, False, True]))
    assert all(type(each) is kind for each in parts)
    assert merge_tensors(tensors, others, flags) == tuple(objects)
    with pytest.raises(EngineError, match="2 tensors and 2 others do not fit"):
        merge_tensors(tensors, others, [True, True, True, False])


def test_which_tensors_are_divided() -> None:
    assert internals.is_activation_to_checkpoint(torch.ones(1))
    settings.configure(of_rank(1, 4))
    assert internals.is_activation_to_checkpoint(torch.ones(4))
    kept = torch.ones(4)
    kept.no_checkpointing = True  # type: ignore[attr-defined]
    for other in (torch.ones(3), torch.ones(4, dtype=torch.int64), torch.ones(4) > 0, kept, None, 4.0):
        assert not internals.is_activation_to_checkpoint(other)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_slices_of_all_ranks_make_the_whole(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, mask = torch.arange(10.0).view(2, 5), torch.ones(10, dtype=torch.bool)
    slices = []
    for rank in range(size):
        settings.configure(of_rank(rank, size))
        mine, same = internals.partition_activations([whole, mask], True, True)
        assert same is mask
        assert mine.numel() == internals.get_partition_size(whole) == -(-10 // size)
        start = internals.get_partition_start(whole)
        assert start == rank * mine.numel()
        assert torch.equal(mine[: 10 - start], whole.view(-1)[start : start + mine.numel()])
        slices.append(mine)
    monkeypatch.setattr(internals.kept, "gather", lambda mine, place: torch.cat(slices))
    got = internals.gather_partitioned_activations((slices[0], torch.tensor([2, 5]), mask, None), "cpu")
    assert torch.equal(got[0], whole)
    assert got[1] is mask


def test_slices_that_do_not_fit_are_named() -> None:
    with pytest.raises(EngineError, match="3 values are no pairs"):
        internals.gather_partitioned_activations((1, 2, 3))
    with pytest.raises(EngineError, match=r"of 3 elements is not that of \(2, 5\) on one of 1 ranks"):
        internals.gather_partitioned_activations((torch.ones(3), (2, 5)))
