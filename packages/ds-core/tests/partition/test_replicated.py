"""Stage 0 in an engine: what is outside the groups, what the report says, who writes what."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.errors import NotBuiltError
from ds_core.testing.ranks import run_ranks

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
    "partition": {"replicated": {"bucket_bytes": 64}},
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


def batch(rank: int) -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(rank))


def outside_the_groups() -> dict[str, Any]:
    """Train the last two layers only; the first requires grad all the same."""
    net = model()
    trained = [*net[2].parameters(), *net[4].parameters()]
    before = copy.deepcopy(net.state_dict())
    engine = ds_core.initialize(model=net, config=CONFIG, model_parameters=trained)[0]
    for _ in range(2):
        engine.backward(engine(batch(comm.get_rank())).sum())
        local = net[0].weight.grad.clone()
        engine.step()
    return {
        "local": local,
        "left": [name for name, param in net.named_parameters() if param.grad is not None],
        "same": [name for name, value in net.state_dict().items() if torch.equal(value, before[name])],
        "hooked": [name for name, param in net.named_parameters() if param._post_accumulate_grad_hooks],
        "report": engine.report(),
    }


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3).to(torch.bfloat16)
        self.c = nn.Linear(3, 3).to(torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).to(torch.bfloat16)).double()).square().mean()


def mixed_dtypes() -> list[str]:
    """Train a model of three dtypes; return what is not as in plain PyTorch with the same dtypes."""
    engine = ds_core.initialize(model=Mixed(), config=CONFIG)[0]
    reference = Mixed()
    engine.backward(engine(batch(comm.get_rank())))
    for rank in range(comm.get_world_size()):
        (reference(batch(rank)) / comm.get_world_size()).backward()
    found = []
    for (name, param), expected in zip(engine.module.named_parameters(), reference.parameters(), strict=True):
        # Two terms are added in the parameter's own dtype, in either order: a rounding each.
        bound = 4 * torch.finfo(param.dtype).eps * (1 + expected.grad.abs().max())
        if param.grad.dtype != expected.grad.dtype or (param.grad - expected.grad).abs().max() > bound:
            found.append(name)
    # What passed through bf16 on the way is as wrong as bf16 is.
    engine.step()
    return found


def sparse() -> str:
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    engine = ds_core.initialize(model=net, config=CONFIG)[0]

    def train() -> None:
        engine.backward(engine(torch.tensor([1, 2])).sum())
        engine.step()

    with pytest.raises(NotBuiltError, match="sparse gradient") as caught:
        train()  # the hook says it on two ranks, the step on one
    return str(caught.value.where)


def writers() -> list[tuple[str, int]]:
    net = model()
    net.register_buffer("count", torch.zeros(100))
    engine = ds_core.initialize(model=net, config=CONFIG)[0]
    return [(piece.of.name, piece.writer) for piece in engine.parts.partition.pieces()]


def on_ranks() -> dict[str, Any]:
    return {function.__name__: function() for function in (outside_the_groups, mixed_dtypes, sparse, writers)}


@pytest.fixture(scope="module", params=[1, 2])
def results(request) -> list[dict[str, Any]]:
    [found] = run_ranks([on_ranks], request.param)
    return found


def test_a_parameter_outside_the_groups_is_left_alone_and_reported(results):
    for found in results:
        of = found["outside_the_groups"]
        assert of["same"] == ["0.weight", "0.bias"]
        assert of["left"] == [], "the step forgets its gradient too"
        assert of["hooked"] == ["2.weight", "2.bias", "4.weight", "4.bias"]
        key = "trainable parameters without an optimizer"
        assert of["report"][key] == "not reduced, not updated: 0.weight, 0.bias"
    if len(results) == 2:
        first, second = (found["outside_the_groups"]["local"] for found in results)
        assert not torch.equal(first, second), "each rank has its own"


def test_the_report_counts_the_buckets(results):
    for found in results:
        text = found["outside_the_groups"]["report"].get("gradient buckets")
        # 4.bias alone, then the 16 bytes of 4.weight and of 2.bias with the 64 of 2.weight; 4 bytes more for each flag.
        expected = "2, 116 bytes in all, summed while backward runs" if len(results) == 2 else None
        assert text == expected


def test_every_dtype_is_averaged_in_itself(results):
    assert [found["mixed_dtypes"] for found in results] == [[]] * len(results)


def test_a_sparse_gradient_is_refused_at_every_world_size(results):
    assert {found["sparse"] for found in results} == {"parameter '0.weight'"}


def test_writing_is_spread_and_ranks_agree_on_it(results):
    assert all(found["writers"] == results[0]["writers"] for found in results)
    by_name = dict(results[0]["writers"])
    assert by_name["count"] == 0, "buffers are rank 0's"
    assert set(by_name.values()) == set(range(len(results)))
