"""Sharded gradients beyond the contract: how many buckets have memory at a time, windows that break, and restoring."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.errors import CheckpointError
from ds_core.testing.memory import LiveStorage
from ds_core.testing.ranks import run_ranks
from ds_zero.gradients import IN_FLIGHT

LAYERS = 8
PARTS = (torch.float32, torch.float64)


class Model(nn.Module):
    """Buckets of two dtypes and of different sizes, a parameter each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = [4 + at % 3 for at in range(LAYERS + 1)]
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=False, dtype=PARTS[at // 4]) for at, (a, b) in enumerate(itertools.pairwise(widths))
        )

    def forward(self, x: torch.Tensor, first: int = 0) -> torch.Tensor:
        for layer in self.layers[first:]:
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        return x.square().sum()


def start(stage: int, accumulation: int = 1, bucket_size: int = 1) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket_size},
    }
    return ds_core.initialize(model=Model(), config=config)[0]


def batch(seed: int, width: int = 4) -> torch.Tensor:
    return torch.randn(1, width, generator=torch.Generator().manual_seed(10 * seed + comm.get_rank()))


def gradients_of(engine: Any) -> Any:
    return engine.parts.partition._gradients


def open_buckets(engine: Any) -> int:
    return sum(bucket.storage is not None for bucket in gradients_of(engine).buckets)


def memory(stage: int) -> tuple[list[int], int]:
    """Return how many buckets have memory whenever a gradient arrives, and between two backwards of a window."""
    engine = start(stage, 2)
    counts: list[int] = []
    for layer in engine.module.layers:
        layer.weight.register_post_accumulate_grad_hook(lambda param: counts.append(open_buckets(engine)))
    after = []
    for seed in range(4):
        engine.backward(engine(batch(seed)))
        after.append(open_buckets(engine))
        if stage == 2:
            assert all(param.grad is None for param in engine.module.parameters()), "some are on their way"
        engine.step()
    assert open_buckets(engine) == 0, "a boundary"
    return counts, after[0]


def used_by_one_rank(stage: int) -> list[tuple[bool, bool]]:
    """Rank 1 skips the first layers; nobody uses what both skip."""
    engine = start(stage)
    found = []
    for firsts in ((0, 3), (3, 3)):
        first = firsts[comm.get_rank()]
        engine.backward(engine(batch(0, 4 + first % 3), first))
        params = [layer.weight for layer in engine.module.layers]
        read = engine.parts.partition.reduced_gradient
        found.append((read(params[0]) is not None, read(params[5]) is not None))
        engine.step()
    return found


def order_of_sending(stage: int) -> list[int]:
    """Return the order in which buckets were sent where rank 1's first layers are last: it skips the last ones."""
    engine = start(stage)
    buckets, sent = gradients_of(engine), []
    send = buckets.send
    buckets.send = lambda bucket: (sent.append(bucket.index), send(bucket))[1]
    loss = engine(batch(0))
    if comm.get_rank() == 1:
        loss = engine.module.layers[0](batch(0)).sum().double()
    engine.backward(loss)
    engine.step()
    return sent


def stopped(engine: Any) -> list[Any]:
    """Train the first half of a window, and return copies of its gradients."""
    engine.backward(engine(batch(0)))
    engine.step()
    return [
        type(piece)(piece.of, piece.chunk, piece.data.detach().clone(), piece.writer)
        for piece in engine.parts.partition.gradient_pieces()
    ]


def restored(stage: int) -> bool:
    """A window that is stopped, read and restored in another engine goes on to the same weights, bit for bit."""
    one, two = start(stage, 2), start(stage, 2)
    pieces = stopped(one)
    assert {piece.of.name for piece in pieces} == {f"layers.{at}.weight" for at in range(LAYERS)}
    two.parts.partition.restore_gradients(pieces)
    two.parts.accumulation.in_window = 1
    for engine in (one, two):
        engine.backward(engine(batch(1)))
        engine.step()
    return all(map(torch.equal, one.module.parameters(), two.module.parameters()))


def restored_in_other_buckets(stage: int) -> str:
    """Return what is said to a window whose gradients are divided in another way here."""
    pieces = stopped(start(stage, 2))
    try:
        start(stage, 2, bucket_size=1000).parts.partition.restore_gradients(pieces)
    except CheckpointError as error:
        return error.what
    return "restored"


def destroyed(stage: int) -> int:
    """Return how many bytes of gradients an engine has that somebody still holds after destroy()."""
    engine = start(stage, 2)
    engine.backward(engine(batch(0)))
    partition = engine.parts.partition
    buckets = list(gradients_of(engine).buckets)
    with LiveStorage() as live:
        live.track(tensor for bucket in buckets for tensor in (bucket.storage, bucket.keep()) if tensor is not None)
        assert live.live_bytes > 0
        engine.destroy()
        left = live.live_bytes
    assert partition.optimizer_pieces()
    return left


STAGES = (1, 2)
FUNCTIONS = (memory, used_by_one_rank, order_of_sending, restored, restored_in_other_buckets, destroyed)


@pytest.fixture(scope="module")
def results() -> dict[tuple[Any, int], list[Any]]:
    cases = [(function, stage) for function in FUNCTIONS for stage in STAGES]
    found = run_ranks([partial(*case) for case in cases], 2)
    return dict(zip(cases, found, strict=True))


def test_stage_2_has_memory_for_a_few_buckets_at_a_time(results):
    for counts, after in results[memory, 2]:
        assert max(counts) <= IN_FLIGHT + 1
        assert after == IN_FLIGHT, "the last ones travel during the next forward; of the others the shard stays"


def test_stage_1_keeps_full_gradients_inside_a_window(results):
    for counts, after in results[memory, 1]:
        assert max(counts) == LAYERS
        assert after == LAYERS


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_is_used_where_any_rank_used_it(results, stage):
    assert results[used_by_one_rank, stage] == [[(True, True), (False, True)]] * 2


@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_sends_in_the_order_of_the_buckets(results, stage):
    assert results[order_of_sending, stage] == [list(range(LAYERS))] * 2


@pytest.mark.parametrize("stage", STAGES)
def test_a_window_goes_on_where_it_is_restored(results, stage):
    assert results[restored, stage] == [True, True]


def test_a_window_that_was_divided_in_another_way_is_refused(results):
    # At stage 1 every rank has full gradients inside a window.
    assert results[restored_in_other_buckets, 1] == ["restored"] * 2
    assert all("divided in another way" in told for told in results[restored_in_other_buckets, 2])


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_that_was_destroyed_holds_no_gradients(results, stage):
    assert results[destroyed, stage] == [0, 0]
