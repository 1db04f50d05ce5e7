"""Stopping and resuming in low precision: bit for bit at the same world size, the same tensors at another."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.ranks import run_ranks
from ds_core.testing.resume import everything, save_each, start, train, unequal
from ds_core.testing.state import reset_globals

if TYPE_CHECKING:
    from pathlib import Path

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 1, "hysteresis": 2}},
    "fp16, static scale": {"fp16": {"enabled": True, "loss_scale": 128}},
    "bf16": {"bf16": {"enabled": True}},
    "bf16, fp32 sums": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "autocast bf16": {"torch_autocast": {"enabled": True, "dtype": "bf16"}},
    "autocast fp16": {"torch_autocast": {"enabled": True, "dtype": "fp16"}},
}
MICRO_STEPS = 14
"""Four windows of 3 and most of a fifth, whose gradients are compared too."""
OVERFLOWS = {1: 0, 5: -1}
"""In the middle of the first window on rank 0, at the end of the second on the last rank."""
SCALES = {
    # One overflow takes the hysteresis, the next one half of the scale; the second good step after it doubles that.
    "fp16": [1024] * 2 + [1024] * 3 + [512] * 6 + [1024] * 3,
    "fp16, static scale": [128] * MICRO_STEPS,
    "autocast fp16": [65536] * 2 + [32768] * 3 + [16384] * 9,
}
"""After each micro-step."""


def resumed_runs_that_differ(folder: Path, precision: str) -> list[str]:
    """Save after every micro-step; resume from each in a fresh engine; return where it is not the same run."""
    engine = start(PRECISIONS[precision], seed=0)
    scales: list[float] = []
    save = save_each(folder)

    def after_each(engine: Any) -> None:
        scales.append(engine.cur_scale)
        save(engine)

    losses = train(engine, MICRO_STEPS, overflows=OVERFLOWS, after_each=after_each)
    assert scales == SCALES.get(precision, [1.0] * MICRO_STEPS), scales
    assert (engine.global_steps, engine.skipped_steps) == (4, 2)
    assert all(torch.isfinite(torch.tensor(losses))), losses
    expected = everything(engine)
    assert any(key.startswith("gradient") for key in expected)
    assert any(key.startswith("master") for key in expected) == (not precision.startswith("autocast"))
    found = []
    for at in range(1, MICRO_STEPS):
        engine = start(PRECISIONS[precision], seed=at)
        engine.load_checkpoint(folder, tag=f"micro{at}")
        again = train(engine, MICRO_STEPS - at, overflows=OVERFLOWS)
        if again != losses[at:]:
            found.append(f"from {at}: losses {again} instead of {losses[at:]}")
        found += [f"from {at}: {what}" for what in unequal(everything(engine), expected)]
    return found


def save_at_boundary(folder: Path, precision: str) -> dict[str, Any]:
    """Train two windows, of which one is skipped, save, and return what was saved."""
    engine = start(PRECISIONS[precision], seed=0)
    train(engine, 6, overflows={1: -1})
    engine.save_checkpoint(folder)
    assert engine.skipped_steps == 1
    return everything(engine)


def load_and_go_on(folder: Path, precision: str) -> tuple[dict[str, Any], list[float]]:
    engine = start(PRECISIONS[precision], seed=5)
    engine.load_checkpoint(folder)
    loaded = everything(engine)
    return loaded, train(engine, 3)


def on_two_ranks(folder: Path) -> dict[str, dict[str, Any]]:
    """Do all that is looked at below on two ranks, in one spawn; ``folder`` has the checkpoints of one rank."""
    found: dict[str, dict[str, Any]] = {"differing": {}, "saved": {}, "loaded": {}}
    for precision in PRECISIONS:
        # A folder of its own for each precision; both ranks save to it.
        found["differing"][precision] = resumed_runs_that_differ(folder / precision / "resume", precision)
        found["saved"][precision] = save_at_boundary(folder / precision / "by 2", precision)
        found["loaded"][precision] = load_and_go_on(folder / precision / "by 1", precision)
    return found


def on_three_ranks(folder: Path) -> dict[str, Any]:
    return {precision: load_and_go_on(folder / precision / "by 2", precision) for precision in PRECISIONS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved_by_1(folder):
    reset_globals()
    found = {precision: save_at_boundary(folder / precision / "by 1", precision) for precision in PRECISIONS}
    reset_globals()
    return found


@pytest.fixture(scope="module")
def of_two_ranks(folder, saved_by_1):
    [found] = run_ranks([partial(on_two_ranks, folder)], 2, timeout_s=120)
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_resumed_at_any_micro_step_it_is_the_same_run_bit_for_bit(precision, tmp_path):
    assert resumed_runs_that_differ(tmp_path, precision) == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_so_it_is_on_two_ranks(precision, of_two_ranks):
    assert [found["differing"][precision] for found in of_two_ranks] == [[], []]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_ranks_load_the_bits_of_one(precision, saved_by_1, of_two_ranks):
    for rank in (0, 1):
        loaded, losses = of_two_ranks[rank]["loaded"][precision]
        assert unequal(loaded, saved_by_1[precision]) == []
        assert all(loss == loss for loss in losses)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_rank_loads_the_bits_of_two(precision, folder, of_two_ranks):
    loaded, losses = load_and_go_on(folder / precision / "by 2", precision)
    assert unequal(loaded, of_two_ranks[0]["saved"][precision]) == []
    assert all(loss == loss for loss in losses)


def test_three_ranks_load_the_bits_of_two(folder, of_two_ranks):
    [found] = run_ranks([partial(on_three_ranks, folder)], 3, timeout_s=60)
    for of_rank in found:
        for precision, (loaded, losses) in of_rank.items():
            assert unequal(loaded, of_two_ranks[0]["saved"][precision]) == []
            assert all(loss == loss for loss in losses)
