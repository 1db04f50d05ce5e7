"""P03 at fp32, stage 0: every loss, gradient and weight against plain PyTorch, and the check that the check works."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import ds_core
from ds_core import comm
from ds_core.testing.ranks import run_ranks
from ds_core.testing.reference import (
    MODELS,
    OUTPUTS,
    Case,
    build_model,
    differences,
    every_case,
    loss_of,
    micro_batch,
    reference,
    train,
)


def wrong_cases(cases: list[Case]) -> dict[str, list[str]]:
    """Train every case on this rank; return those that are off, with what is."""
    rank, world_size = comm.get_rank(), comm.get_world_size()
    found = {}
    for case in cases:
        problems = differences(case, train(case), reference(case, world_size, rank))
        if problems:
            found[str(case)] = problems
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_case_equals_plain_pytorch(world_size):
    [results] = run_ranks([partial(wrong_cases, list(every_case()))], world_size, timeout_s=120)
    assert results == [{}] * world_size


def test_four_ranks_equal_plain_pytorch():
    # A covering set: every pair of factor values occurs (the full product at 4 ranks takes minutes on two cores).
    cases = [
        Case(model, OUTPUTS[(i + j) % 4], accumulation=1 + (i + j) % 3, clipping=clipping, optimizer=optimizer)
        for i, model in enumerate(MODELS)
        for j, (clipping, optimizer) in enumerate([(0.0, "SGD"), (0.05, "AdamW"), (0.05, "SGD"), (0.0, "AdamW")])
    ]
    [results] = run_ranks([partial(wrong_cases, cases)], 4, timeout_s=120)
    assert results == [{}] * 4


@pytest.mark.slow
def test_every_case_on_four_ranks():
    [results] = run_ranks([partial(wrong_cases, list(every_case()))], 4, timeout_s=600)
    assert results == [{}] * 4


def train_with_one_rank_off(factor: float) -> list[str]:
    """Multiply rank 1's loss by ``factor``; return what the comparison says."""
    case = Case("plain", optimizer="SGD")
    tampered = train(case, tamper=lambda loss: loss * factor if comm.get_rank() == 1 else loss)
    return differences(case, tampered, reference(case, comm.get_world_size(), comm.get_rank()))


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_counted_wrongly_is_noticed(world_size):
    # The mutation check of P03: a comparison that accepts these shows nothing.
    for problems in run_ranks([partial(train_with_one_rank_off, factor) for factor in (2.0, 0.0, 0.5)], world_size):
        for of_rank in problems:
            assert any("gradient of" in problem for problem in of_rank)
            assert any("weight" in problem for problem in of_rank)


def run_engines(interleaved: bool) -> list[dict[str, torch.Tensor]]:
    """Train two different models, step by step in turn or one after the other; return their weights."""
    cases = [Case("all", optimizer="AdamW", accumulation=2, clipping=0.05), Case("tied", "dict", optimizer="SGD")]

    def start(case: Case):
        return ds_core.initialize(
            model=build_model(case),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": case.accumulation,
                "gradient_clipping": case.clipping,
                "optimizer": {"type": case.optimizer, "params": case.options},
            },
        )[0]

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


@pytest.mark.parametrize("world_size", [1, 2])
def test_two_engines_interleaved_equal_two_apart(world_size):
    together, apart = run_ranks([partial(run_engines, True), partial(run_engines, False)], world_size)
    for of_rank, expected in zip(together, apart, strict=True):
        for weights, want in zip(of_rank, expected, strict=True):
            assert all(torch.equal(weights[name], want[name]) for name in want)


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


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_several_backwards_before_a_step_add_up(world_size):
    [results] = run_ranks([several_backwards], world_size)
    for twice, once in results:
        for name, want in once.items():
            assert (twice[name] is None) == (want is None), name
            if want is not None:
                # As in ds_core.testing.reference: sums of the same numbers in another order.
                torch.testing.assert_close(twice[name], want, rtol=2**-14, atol=2**-14)
