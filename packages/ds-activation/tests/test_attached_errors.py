"""Blocks that a policy does not suit: errors that name them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ds_activation.attached import DeepSpeedActivation
from ds_activation.call import RecomputationError
from ds_core.config import load_config
from ds_core.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor


def attach(model: nn.Module, policy: str) -> None:
    config = load_config({"train_batch_size": 1, "activation_checkpointing": {"policy": policy}})
    DeepSpeedActivation().attach(model, config, None, torch.device("cpu"))  # type: ignore[arg-type]


class Moving(nn.Module):
    """Reads a buffer that each forward moves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.5)
        return torch.tanh(self.linear(x - self.mean))


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_block_that_moves_its_buffers_is_refused(policy: str) -> None:
    model = nn.Sequential(Moving(), Moving())
    attach(model, policy)
    with pytest.raises(EngineError, match="block '0' changes its buffer 'mean'"):
        model(torch.randn(3, 4))
    with torch.no_grad():
        model(torch.randn(3, 4))


class Counting(nn.Module):
    """Does more in every other run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.runs = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        y = self.linear(x).exp()
        return y.sin().exp() if self.runs % 2 else y


@pytest.mark.parametrize("policy", ["full", "every_n"])
def test_a_block_that_does_something_else_in_its_second_run_is_named(policy: str) -> None:
    model = nn.Sequential(nn.Sequential(Counting(), Counting()))
    attach(model, policy)
    loss = model(torch.randn(3, 4)).sum()
    with pytest.raises(RecomputationError, match=r"block '0\.[01]', computed again in backward, is not what it was"):
        loss.backward()


class InPlace(nn.Module):
    """Changes the result of a product in place, which selective recomputation has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.linear(x), inplace=True).exp())


def test_a_block_that_selective_recomputation_does_not_suit_is_named() -> None:
    model = nn.Sequential(InPlace(), InPlace())
    attach(model, "selective")
    loss = model(torch.randn(3, 4)).sum()
    with pytest.raises(EngineError, match="what was kept of the block '1'"):
        loss.backward()


def test_a_second_backward_under_selective_recomputation_names_the_block() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()) for _ in range(2)))
    attach(model, "selective")
    loss = model(torch.randn(3, 4)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(EngineError, match="what was kept of the block '1'") as caught:
        loss.backward()
    assert 'set policy to "full"' in str(caught.value)
