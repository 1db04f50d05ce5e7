"""inf and NaN on real ranks: who skips, what stays as it was, what is told, and what the steps after it are.

What may befall a step, beside every factor of the matrix of P03, is in :mod:`ds_core.testing.incidents`.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.errors import LossScaleError
from ds_core.interfaces.logical import MASTER
from ds_core.testing.incidents import INCIDENT_FACTORS, INCIDENTS, Watch, incident_case, poison, wrong_incidents
from ds_core.testing.low_precision import PRECISIONS
from ds_core.testing.matrix import full, pairwise
from ds_core.testing.ranks import run_ranks
from ds_core.testing.reference import Case, logical_values, loss_of, micro_batch, start

INF, NAN = math.inf, math.nan
VALUES = {"inf": INF, "nan": NAN}
WORLD_SIZES = (1, 2, 4)
PAIRS = [incident_case(row) for row in pairwise(INCIDENT_FACTORS)]
FIRST, LAST = 0, 1
SCENARIOS = {
    # Each micro-batch of a window of 2; "sometimes" is used by the poisoned rank alone in that window.
    "first micro-batch": (1, 1, FIRST, "block.weight", INF),
    "last micro-batch": (1, 1, LAST, "block.weight", -INF),
    "used by this rank alone, first step": (0, 0, FIRST, "sometimes.weight", NAN),
    "used by this rank alone": (1, 1, LAST, "sometimes.bias", INF),
}
"""name -> rank, step, micro-batch, parameter, value."""


def fp16_section(**keys: Any) -> dict[str, Any]:
    return {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 1, "hysteresis": 1, **keys}


def sections(precision: str) -> dict[str, Any]:
    """Return what is added to the configuration of a ``Case`` of ``precision``."""
    return {"fp16": fp16_section()} if precision == "fp16" else {}


def poison_once(scenario: str) -> Any:
    rank, step, micro, parameter, value = SCENARIOS[scenario]

    def before_backward(engine: Any, at_step: int, at_micro: int) -> None:
        if (comm.get_rank(), at_step, at_micro) == (rank, step, micro):
            poison(engine, parameter, value)

    return before_backward


def snapshot(engine: Any) -> dict[str, Any]:
    weights = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    return {
        "weights": weights,
        "masters": logical_values(engine, MASTER),
        "optimizer": copy.deepcopy(engine.basic_optimizer.state_dict()),
        "schedule": copy.deepcopy(engine.lr_scheduler.state_dict()),
        "lr": engine.get_lr(),
    }


def across_an_overflow(precision: str, scenario: str) -> dict[str, Any]:
    """Return what there was before a poisoned step, and after it, and what was told."""
    _, bad_step, _, _, _ = SCENARIOS[scenario]
    case = Case("all", "tensor", 2, clipping=0.05, optimizer="AdamW", precision=precision)
    schedule = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_type": "linear"}}}
    engine = start(case, {**sections(precision), **schedule})
    before_backward = poison_once(scenario)
    found: dict[str, Any] = {}
    for step in range(bad_step + 1):
        found = {"before": snapshot(engine), "scale": engine.cur_scale}
        for micro in range(case.accumulation):
            loss = loss_of(engine(*micro_batch(step, micro, comm.get_rank())))
            before_backward(engine, step, micro)
            engine.backward(loss)
            engine.step()
    return {
        **found,
        "after": snapshot(engine),
        "applied": engine.was_step_applied(),
        "steps": (engine.global_steps, engine.skipped_steps, engine.global_samples),
        "gradients": [name for name, param in engine.module.named_parameters() if param.grad is not None],
        "overflows": engine.overflows,
    }


def equal(a: Any, b: Any) -> bool:
    """Return whether two snapshots are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


class Dot(nn.Module):
    """Its gradient is its input, whatever its weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.inner.w * x).sum()


PRECISION_SECTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"fp16": fp16_section()},
    "bf16": {"bf16": {"enabled": True}},
    "bf16 unchecked": {"bf16": {"enabled": True, "check_grad_overflow": False}},
    "autocast bf16": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "autocast fp16": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
}


def dot_engine(precision: str, optimizer: str = "SGD", **config: Any) -> Any:
    return ds_core.initialize(
        model=Dot(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "optimizer": {"type": optimizer, "params": {"lr": 0.5, "weight_decay": 0.125}},
            **PRECISION_SECTIONS[precision],
            **config,
        },
    )[0]


def trained(engine: Any) -> torch.Tensor:
    """Return what the optimizer updates."""
    return logical_values(engine, MASTER).get("inner.w", engine.module.inner.w.detach()).clone()


def dot_step(engine: Any, x: list[float]) -> None:
    engine.backward(engine(torch.tensor(x)))
    engine.step()


def torch_steps(gradients: list[list[float]], optimizer: str = "SGD", clipping: float = INF) -> list[torch.Tensor]:
    """Return the weight of ``Dot`` after each step of plain PyTorch in fp32."""
    weight = nn.Parameter(Dot().inner.w.detach())
    plain = getattr(torch.optim, optimizer)([weight], lr=0.5, weight_decay=0.125)
    found = []
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        if clipping < INF:
            nn.utils.clip_grad_norm_([weight], clipping)
        plain.step()
        found.append(weight.detach().clone())
    return found


GROWTH_STEPS = 8
GROWTH = {1: [16, 16, 32, 64, 128, 256, 512, 1024], 2: [16, 16, 16, 32, 32, 64, 64, 128]}
"""Window -> the scale of each step (spec/fp16.md section 4)."""


def growing(window: int) -> dict[str, Any]:
    """Train while the scale grows; ranks see different numbers."""
    engine = dot_engine("fp16", fp16=fp16_section(initial_scale_power=4, loss_scale_window=window))
    scales, weights = [], []
    for step in range(GROWTH_STEPS):
        scales.append(engine.cur_scale)
        dot_step(engine, growth_input(step, comm.get_rank()))
        weights.append(trained(engine))
    return {"scales": scales, "weights": weights, "skipped": engine.skipped_steps}


def growth_input(step: int, rank: int) -> list[float]:
    # Multiples of 1/4: fp16 holds them and their sums exactly at every scale.
    return [0.25 * (step + 1), -0.5 + rank, 1.0 - 0.25 * step]


def zero_gradient(precision: str) -> dict[str, Any]:
    engine = dot_engine(precision, "AdamW")
    dot_step(engine, [0.0, 0.0, 0.0])
    return {
        "applied": engine.was_step_applied(),
        "norm": engine.get_global_grad_norm(),
        "weight": trained(engine),
        "told": engine.overflows,
    }


def clipped(precision: str) -> dict[str, Any]:
    engine = dot_engine(precision, gradient_clipping=1.0)
    dot_step(engine, [3.0, 0.0, -4.0])
    return {"norm": engine.get_global_grad_norm(), "weight": trained(engine), "skipped": engine.skipped_steps}


def not_finite_here(precision: str, value: float) -> dict[str, Any]:
    """Take a step in which the last rank has ``value`` in one element."""
    engine = dot_engine(precision)
    last = comm.get_rank() == comm.get_world_size() - 1
    dot_step(engine, [1.0, value if last else 1.0, 1.0])
    return {
        "applied": engine.was_step_applied(),
        "weight": trained(engine),
        "overflow": engine.overflows[-1],
        "count": len(engine.overflows),
        "stored": engine.module.inner.w.detach().clone(),
    }


def too_large_together() -> dict[str, Any]:
    """Take a step in which each rank's gradient is finite in fp16, and their sum is not."""
    engine = dot_engine("fp16")
    dot_step(engine, [1.0, 60000.0 / 1024 * comm.get_world_size(), 1.0])
    return {"applied": engine.was_step_applied(), "overflow": engine.overflows[-1]}


def down_to_the_minimum() -> str:
    """Overflow until the scale cannot fall; return what the error says, on every rank."""
    engine = dot_engine("fp16", fp16=fp16_section(initial_scale_power=2))
    value = INF if comm.get_rank() == 1 else 1.0
    for _ in range(2):
        dot_step(engine, [1.0, value, 1.0])
    assert engine.cur_scale == 1.0
    try:
        dot_step(engine, [1.0, value, 1.0])
    except LossScaleError as error:
        return str(error)
    return "no error"


DOT_JOBS: dict[Any, Any] = {
    **{("grow", window): partial(growing, window) for window in GROWTH},
    **{("zero", precision): partial(zero_gradient, precision) for precision in PRECISIONS},
    **{("clip", precision): partial(clipped, precision) for precision in PRECISIONS},
    **{
        ("value", precision, name): partial(not_finite_here, precision, value)
        for precision in ("fp32", "bf16 unchecked", "bf16", "fp16", "autocast fp16", "autocast bf16")
        for name, value in VALUES.items()
    },
}
TWO_RANK_JOBS: dict[Any, Any] = {
    **{
        ("across", precision, scenario): partial(across_an_overflow, precision, scenario)
        for precision in PRECISIONS
        for scenario in SCENARIOS
    },
    "together": too_large_together,
    "minimum": down_to_the_minimum,
}


def with_an_incident_that_did_not_happen() -> dict[str, list[str]]:
    """Take away what brings a scenario about; return what the comparison says."""
    found = {}
    for scenario in INCIDENTS:
        if scenario != "none":
            watch = Watch(scenario, Case("all", precision="bf16"), happens=False)
            found[scenario] = watch.compare(watch.train())
    return found


def run_all() -> dict[Any, Any]:
    world_size = comm.get_world_size()
    jobs: dict[Any, Any] = {"pairs": partial(wrong_incidents, PAIRS)}
    if world_size == 2:
        jobs |= TWO_RANK_JOBS
    if world_size > 1:
        jobs["unpoisoned"] = with_an_incident_that_did_not_happen
    if world_size < 4:
        jobs |= DOT_JOBS
    return {name: job() for name, job in jobs.items()}


@pytest.fixture(scope="module", params=WORLD_SIZES)
def world_size(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def results(world_size) -> dict[Any, Any]:
    """Everything of one world size in one spawn: what is asked -> what each rank answered."""
    [of_ranks] = run_ranks([run_all], world_size, timeout_s=120)
    return {job: [of_rank[job] for of_rank in of_ranks] for job in of_ranks[0]}


on_two_ranks = pytest.mark.parametrize("world_size", [2], indirect=True)
on_few_ranks = pytest.mark.parametrize("world_size", [1, 2], indirect=True)


def test_every_pair_of_a_scenario_and_another_value_is_answered_rightly(results, world_size):
    assert results["pairs"] == [{}] * world_size


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:], indirect=True)
def test_an_incident_that_did_not_happen_is_noticed(results):
    # A comparison that accepts these shows nothing.
    for of_rank in results["unpoisoned"]:
        assert of_rank.keys() == {name for name in INCIDENTS if name != "none"}
        for scenario, problems in of_rank.items():
            if scenario == "zero gradient":
                assert any("the norm of a gradient of zero is" in problem for problem in problems)
                continue
            step = INCIDENTS[scenario].step
            assert any(problem.startswith(f"step {step}: skipped is False") for problem in problems)
            assert any(problem.startswith("the skipped step moved master block.weight") for problem in problems)
            assert "the skipped step moved the optimizer's state" in problems
            assert any(problem.startswith("records of overflows are []") for problem in problems)


@on_two_ranks
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_skipped_step_changes_nothing_and_says_so(results, precision, scenario):
    rank, step, _, parameter, _ = SCENARIOS[scenario]
    for found in results["across", precision, scenario]:
        assert equal(found["before"], found["after"])
        assert found["before"]["masters"].keys() == (
            set() if precision.startswith("autocast") else set(found["before"]["weights"]) - FROZEN
        )
        assert (found["before"]["optimizer"]["state"] == {}) == (step == 0)
        assert found["applied"] is False
        # 2 samples x 2 micro-batches x 2 ranks.
        assert found["steps"] == (step + 1, 1, 8 * (step + 1))
        assert found["gradients"] == []
        [record] = found["overflows"]
        assert record.step == step + 1
        assert record.scale == found["scale"] == (1024.0 if "fp16" in precision else 1.0)
        assert record.parameter == parameter
        assert record.module == parameter.partition(".")[0]
        assert record.module_type == "Linear"
        assert record.ranks == (rank,)
        assert record.skipped is True


FROZEN = {"frozen.weight", "frozen.bias"}


@on_two_ranks
def test_a_sum_that_overflows_is_nobodys(results):
    for found in results["together"]:
        assert found["applied"] is False
        assert found["overflow"].parameter == "inner.w"
        assert found["overflow"].ranks == ()


@on_two_ranks
def test_the_error_at_the_minimum_scale_tells_the_story(results):
    first, second = results["minimum"]
    assert first == second
    assert "inner.w" in first
    assert "Module 'inner'" in first
    assert "on rank 1" in first
    for scale in (4, 2, 1):
        assert f"at loss scale {scale}:" in first


@on_few_ranks
@pytest.mark.parametrize("window", GROWTH)
def test_a_step_on_which_the_scale_grows_has_full_strength(results, world_size, window):
    def mean(step: int) -> list[float]:
        inputs = torch.tensor([growth_input(step, rank) for rank in range(world_size)])
        return inputs.mean(0).tolist()

    expected = torch_steps([mean(step) for step in range(GROWTH_STEPS)])
    for found in results["grow", window]:
        assert found["scales"] == GROWTH[window]
        assert found["skipped"] == 0
        for got, want in zip(found["weights"], expected, strict=True):
            # fp32's own: a multiplication by the scale's inverse rounds nothing.
            torch.testing.assert_close(got, want, rtol=2**-22, atol=0)


@on_few_ranks
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_gradient_of_zero_is_a_step(results, precision):
    [expected] = torch_steps([[0.0, 0.0, 0.0]], "AdamW")
    assert not torch.equal(expected, Dot().inner.w), "weight decay acts"
    for found in results["zero", precision]:
        assert found["applied"] is True
        assert found["norm"] == 0.0
        assert found["told"] == ()
        torch.testing.assert_close(found["weight"], expected, rtol=2**-22, atol=0)


@on_few_ranks
@pytest.mark.parametrize("precision", PRECISIONS)
def test_clipping_acts_on_the_true_norm(results, precision):
    [expected] = torch_steps([[3.0, 0.0, -4.0]], clipping=1.0)
    for found in results["clip", precision]:
        assert found["skipped"] == 0
        assert found["norm"] == pytest.approx(5.0, rel=2**-22)
        torch.testing.assert_close(found["weight"], expected, rtol=2**-20, atol=0)


@on_few_ranks
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("precision", ["fp32", "bf16 unchecked"])
def test_where_nothing_is_checked_the_step_is_applied(results, world_size, precision, value):
    [expected] = torch_steps([[1.0, VALUES[value], 1.0]])
    for found in results["value", precision, value]:
        assert found["applied"] is True
        assert not expected[1].isfinite()
        torch.testing.assert_close(found["weight"], expected, rtol=2**-22, atol=0, equal_nan=True)
        assert torch.equal(found["stored"].isfinite(), expected.isfinite())
        assert found["count"] == 1
        assert found["overflow"].parameter == "inner.w"
        assert found["overflow"].skipped is False
        # Looking at every gradient before it is sent is for precisions that skip. One rank alone is known anyway.
        assert found["overflow"].ranks == (None if world_size > 1 else (0,))


@on_few_ranks
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_where_it_is_checked_every_rank_skips(results, world_size, precision, value):
    for found in results["value", precision, value]:
        assert found["applied"] is False
        assert torch.equal(found["weight"], Dot().inner.w)
        assert found["overflow"].ranks == (world_size - 1,)
        assert found["overflow"].module == "inner"


@pytest.mark.slow
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("scenario", [name for name in INCIDENTS if name != "none"])  # that one is test_numbers.py
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world_size", WORLD_SIZES, indirect=True)
def test_every_case(world_size, precision, scenario):
    rows = full({**INCIDENT_FACTORS, "precision": (precision,), "scenario": (scenario,)})
    [found] = run_ranks([partial(wrong_incidents, [incident_case(row) for row in rows])], world_size, timeout_s=3600)
    assert found == [{}] * world_size
