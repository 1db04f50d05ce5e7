"""Policies of ds-activation change no number, whatever the precision and the ZeRO stage."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.testing.ranks import run_ranks

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True, "auto_cast": True}},
    "fp16": {"fp16": {"enabled": True, "auto_cast": True, "initial_scale_power": 8}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}
POLICIES: tuple[dict[str, Any], ...] = (
    {"policy": "full"},
    {"policy": "every_n"},
    {"policy": "selective"},
    {"policy": "auto"},
)
BUDGETS = {"fp32": 7000, "autocast": 7000, "bf16": 3500, "fp16": 3500}
"""Of ``auto``: about two thirds of what everything takes."""
STAGES = (0, 1, 2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 32), nn.Linear(32, 8), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(torch.tanh(self.up(x))))


def trained(stage: int, precision: str, section: dict[str, Any]) -> list[torch.Tensor]:
    """Return the weights after two steps of two micro-batches."""
    if section.get("policy") == "auto":
        section = {**section, "memory_budget": BUDGETS[precision]}
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(4)))
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage},
        "activation_checkpointing": section,
        **PRECISIONS[precision],
    }
    engine = ds_core.initialize(model=model, config=config)[0]
    torch.manual_seed(1 + comm.get_rank())
    for _ in range(4):
        engine.backward(engine(torch.randn(16, 8)).float().square().mean())
        engine.step()
    if "memory_budget" in section:
        line = engine.report()["activation checkpointing"]
        assert "recompute" in line or "selective" in line, line
    weights = [param.detach().clone() for param in model.parameters()]
    engine.destroy()
    return weights


def different(precision: str) -> list[tuple[int, str]]:
    """Return the stages and policies whose weights differ from those of the plain model."""
    found = []
    for stage, section in product(STAGES, POLICIES):
        pairs = zip(trained(stage, precision, {}), trained(stage, precision, section), strict=True)
        if not all(torch.equal(one, other) for one, other in pairs):
            found.append((stage, section["policy"]))
    return found


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found = run_ranks([partial(different, precision) for precision in PRECISIONS], 2, timeout_s=120)
    return dict(zip(PRECISIONS, found, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_the_same(results: dict[str, Any], precision: str) -> None:
    assert results[precision] == [[], []]
