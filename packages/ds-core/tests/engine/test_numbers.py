"""P03 at fp32, stage 0: every loss, gradient and weight against plain PyTorch, and the check that the check works."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import ds_core
from ds_core import comm
from ds_core.testing.low_precision import unnoticed, wrong_cases
from ds_core.testing.matrix import drawn, pairwise, seed_of_today
from ds_core.testing.ranks import run_ranks
from ds_core.testing.reference import (
    MIXED_MODELS,
    MODELS,
    OUTPUTS,
    Case,
    build_model,
    every_case,
    loss_of,
    micro_batch,
    start,
)

FACTORS = {
    "model": MODELS,
    "output": OUTPUTS,
    "accumulation": (1, 2, 3),
    "clipping": (0.0, 0.05),
    "optimizer": ("SGD", "AdamW"),
}
WORLD_SIZES = (1, 2, 4)
PAIRS = [Case(**row) for row in pairwise(FACTORS)]
MIXED = [Case(**row) for row in pairwise({**FACTORS, "model": MIXED_MODELS})]
"""Without masters: parameters given in 16 bits are trained in them, compared in norm."""
MUTATIONS = [(Case("plain", optimizer="SGD"), factor) for factor in (2.0, 0.0, 0.5)]


def run_engines(interleaved: bool) -> list[dict[str, torch.Tensor]]:
    """Train two different models, step by step in turn or one after the other; return their weights."""
    cases = [Case("all", optimizer="AdamW", accumulation=2, clipping=0.05), Case("tied", "dict", optimizer="SGD")]

    def micro_step(engine, case: Case, index: int) -> None:
        tokens, use = micro_batch(index, 0, comm.get_rank())
        engine.backward(loss_of(engine(tokens, use)))
        engine.step()

    if interleaved:
        engines = [start(case) for case in cases]
        for index in range(6):
            for engine, case in zip(engines, cases, strict=True):
                micro_step(engine, case, index)
    else:
        engines = []
        for case in cases:
            engines.append(start(case))
            for index in range(6):
                micro_step(engines[-1], case, index)
    return [{name: value.clone() for name, value in engine.module_state_dict().items()} for engine in engines]


def several_backwards() -> tuple[dict[str, torch.Tensor | None], dict[str, torch.Tensor | None]]:
    """Return the gradients after two backwards in one micro-step, and those of one backward of the summed loss."""
    found = []
    for at_once in (False, True):
        case = Case("all")
        engine, *_ = ds_core.initialize(
            model=build_model(case),
            config={"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}},
        )
        losses = [loss_of(engine(*micro_batch(step, 0, comm.get_rank()))) for step in (0, 1)]
        if at_once:
            engine.backward(losses[0] + losses[1])
        else:
            for loss in losses:
                engine.backward(loss)
        found.append(
            {name: p.grad if p.grad is None else p.grad.clone() for name, p in engine.module.named_parameters()}
        )
        engine.step()
    return found[0], found[1]


def todays(world_size: int) -> list[Case]:
    """Return those of today's 20 cases that run on ``world_size`` ranks."""
    rows = drawn({**FACTORS, "world_size": WORLD_SIZES}, 20, seed=seed_of_today())
    return [Case(**row) for row in rows if row.pop("world_size") == world_size]


@pytest.fixture(scope="module", params=WORLD_SIZES)
def world_size(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def results(world_size) -> dict[str, list[Any]]:
    """Everything of one world size in one spawn: what is asked -> what each rank answered."""
    jobs = {
        "pairs": partial(wrong_cases, PAIRS),
        "today": partial(wrong_cases, todays(world_size)),
        "mixed": partial(wrong_cases, MIXED),
        "together": partial(run_engines, True),
        "apart": partial(run_engines, False),
        "several": several_backwards,
    }
    if world_size > 1:
        jobs["mutations"] = partial(unnoticed, MUTATIONS)
    return dict(zip(jobs, run_ranks(list(jobs.values()), world_size, timeout_s=120), strict=True))


def test_every_pair_of_values_equals_plain_pytorch(results, world_size):
    assert results["pairs"] == [{}] * world_size


def test_cases_drawn_today_equal_plain_pytorch(results, world_size):
    cases = "\n".join(map(str, todays(world_size)))
    assert results["today"] == [{}] * world_size, f"DS_MATRIX_SEED={seed_of_today()} drew\n{cases}"


def test_models_of_mixed_dtypes_equal_plain_pytorch(results, world_size):
    assert results["mixed"] == [{}] * world_size


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:], indirect=True)
def test_a_rank_counted_wrongly_is_noticed(results, world_size):
    # The mutation check of P03: a comparison that accepts these shows nothing.
    assert results["mutations"] == [{}] * world_size


def test_two_engines_interleaved_equal_two_apart(results):
    for of_rank, expected in zip(results["together"], results["apart"], strict=True):
        for weights, want in zip(of_rank, expected, strict=True):
            assert all(torch.equal(weights[name], want[name]) for name in want)


def check_sums(of_ranks: list[Any]) -> None:
    for twice, once in of_ranks:
        for name, want in once.items():
            assert (twice[name] is None) == (want is None), name
            if want is not None:
                # As in ds_core.testing.reference: sums of the same numbers in another order.
                torch.testing.assert_close(twice[name], want, rtol=2**-14, atol=2**-14)


def test_several_backwards_before_a_step_add_up(results):
    check_sums(results["several"])


def test_several_backwards_on_three_ranks_add_up():
    # A third of a sum, three times over, is not exactly the sum.
    [of_ranks] = run_ranks([several_backwards], 3)
    check_sums(of_ranks)


@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("world_size", WORLD_SIZES, indirect=True)
def test_every_case(world_size):
    [results] = run_ranks([partial(wrong_cases, list(every_case()))], world_size, timeout_s=1200)
    assert results == [{}] * world_size
