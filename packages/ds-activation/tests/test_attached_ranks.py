"""Policies on two ranks: one choice of ``auto`` for all of them, and inputs divided over a model-parallel group."""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_core
from ds_activation import kept
from ds_activation.attached import DeepSpeedActivation
from ds_activation.blocks import find_blocks
from ds_activation.choice import Decision, least_peak, predict
from ds_activation.profile import profile
from ds_core import checkpointing
from ds_core.config import load_config
from ds_core.errors import ConfigError
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.ranks import run_ranks

BLOCKS, STEPS = 4, 3


def build() -> nn.Module:
    torch.manual_seed(0)
    blocks = (
        nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Dropout(0.3), nn.Linear(64, 16), nn.Tanh())
        for _ in range(BLOCKS)
    )
    return nn.Sequential(nn.Linear(8, 16), *blocks, nn.Linear(16, 1))


def chosen() -> tuple[list[str], int, int]:
    """Return the decisions of ``auto`` on this rank, their peak, and the budget."""
    model = build()
    found = profile(model, (torch.ones(64, 8),), {}, find_blocks(model, ()))
    budget = (least_peak(found) + predict(found, [Decision.KEEP] * BLOCKS).peak_bytes) // 2
    config = load_config(
        {"train_batch_size": 2, "activation_checkpointing": {"policy": "auto", "memory_budget": budget}}
    )
    attached = DeepSpeedActivation().attach(model, config, dist.group.WORLD, torch.device("cpu"))
    # A quarter of the batch on the first rank: by itself it would keep all.
    with attached.active():
        model(torch.ones(16 if dist.get_rank() == 0 else 64, 8)).sum().backward()
    choice = attached._choice
    return [forward.decision.value for forward in attached._forwards], choice.peak_bytes, budget


class Skipping(nn.Module):
    """The second rank leaves the first block out; what is run is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh())
            for _ in range(BLOCKS)
        )
        self.runs = 0
        for block in self.blocks:
            block[0].register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.runs += 1

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[dist.get_rank() :]:
            x = block(x)
        return x.square().mean()


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def different() -> tuple[list[str], bool, int, list[str]]:
    """Return decisions, whether all gradients are right, the runs of blocks in the second step, and the log."""
    torch.manual_seed(0)
    model = Skipping()
    plain = copy.deepcopy(model)
    config = load_config(
        {"train_batch_size": 2, "activation_checkpointing": {"policy": "auto", "memory_budget": 10**9}}
    )
    log = Lines()
    logging.getLogger("ds_core").addHandler(log)
    attached = DeepSpeedActivation().attach(model, config, dist.group.WORLD, torch.device("cpu"))
    is_equal = True
    for seed in range(2):
        for one, context in ((plain, nullcontext()), (model, attached.active())):
            torch.manual_seed(seed)
            one.zero_grad()
            one.runs = 0
            with context:
                loss = one(torch.ones(4, 8))
            loss.backward()
        for expected, found in zip(plain.parameters(), model.parameters(), strict=True):
            # Of the block that was left out there are none.
            is_equal &= found.grad is None if expected.grad is None else torch.equal(expected.grad, found.grad)
    logging.getLogger("ds_core").removeHandler(log)
    assert plain.runs == BLOCKS - dist.get_rank()
    return [forward.decision.value for forward in attached._forwards], is_equal, model.runs, log.lines


class ModelParallel:
    """Both ranks hold one model together."""

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_model_parallel_group(self) -> Any:
        return dist.group.WORLD


DIVIDED: dict[str, dict[str, Any]] = {
    "slices": {"partition_activations": True},
    "slices on the host": {"partition_activations": True, "cpu_checkpointing": True},
    "slices in buffers": {
        "partition_activations": True,
        "contiguous_memory_optimization": True,
        "number_checkpoints": BLOCKS,
    },
}


def trained_divided() -> dict[str, tuple[bool, int]]:
    """Return whether an engine's weights are those without the section, and how many inputs were gathered."""
    gathered: list[int] = []

    def counted(mine: Tensor, place: Any) -> Tensor:
        gathered.append(mine.numel())
        return gather(mine, place)

    gather, kept.gather = kept.gather, counted
    checkpointing.configure(ModelParallel())
    plain, found = weights({}), {}
    assert not gathered
    for what, flags in DIVIDED.items():
        gathered.clear()
        others = weights({"policy": "full", **flags})
        found[what] = all(map(torch.equal, plain, others)), len(gathered)
    return found


def weights(section: dict[str, Any]) -> list[Tensor]:
    """Return those of an engine after some steps, of equal data on all ranks."""
    model = build()
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "activation_checkpointing": section,
    }
    engine = ds_core.initialize(model=model, config=config)[0]
    torch.manual_seed(3)
    for _ in range(STEPS):
        engine.backward(engine(torch.randn(6, 8)).square().mean())
        engine.step()
    engine.destroy()
    return [param.detach().clone() for param in model.parameters()]


@pytest.fixture(scope="module")
def of_ranks() -> dict[str, list[Any]]:
    functions = {"chosen": chosen, "different": different, "divided": trained_divided}
    return dict(zip(functions, run_ranks(list(functions.values()), 2), strict=True))


def test_two_ranks_choose_the_same(of_ranks: dict[str, list[Any]]) -> None:
    first, second = of_ranks["chosen"]
    assert first == second
    decisions, peak_bytes, budget = first
    assert peak_bytes <= budget
    assert "keep" in decisions
    assert len(set(decisions)) > 1


def test_ranks_whose_first_forwards_were_different_compute_all_again(of_ranks: dict[str, list[Any]]) -> None:
    for rank, (decisions, is_equal, runs, _) in enumerate(of_ranks["different"]):
        assert decisions == ["recompute"] * BLOCKS
        assert is_equal
        assert runs == 2 * (BLOCKS - rank)
    (told,) = [line for line in of_ranks["different"][0][3] if line.startswith("WARNING")]
    assert told.endswith("all blocks are recomputed, the ranks' first forwards were different")


@pytest.mark.parametrize("what", DIVIDED)
def test_engines_that_divide_inputs_have_the_same_weights(of_ranks: dict[str, list[Any]], what: str) -> None:
    for found in of_ranks["divided"]:
        is_equal, gathered = found[what]
        assert is_equal
        assert gathered >= STEPS * BLOCKS  # the input of each block


def test_an_engine_that_is_to_divide_without_an_mpu_says_what_to_do() -> None:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD"},
        "activation_checkpointing": {"policy": "full", "partition_activations": True},
    }
    with pytest.raises(ConfigError, match=r"call checkpointing\.configure\(mpu\) before initialize"):
        ds_core.initialize(model=build(), config=config)
