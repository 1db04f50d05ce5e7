"""The small parts of a step: the window, the clip, the norm, the schedule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_core.engine.parts import Accumulation, Clip, ScheduleStep, global_norm
from ds_core.errors import EngineError
from ds_core.interfaces.partition import SquaredNorm


def test_a_window_ends_with_its_last_micro_batch():
    window = Accumulation(3)
    seen = []
    for _ in range(7):
        seen.append(window.at_boundary)
        window.backwards += 1
        window.advance()
    assert seen == [False, False, True, False, False, True, False]
    assert window.micro_steps == 7


def test_what_the_caller_says_stays_until_taken_back():
    window = Accumulation(2)
    window.override = True
    assert [window.at_boundary, window.at_boundary] == [True, True]
    window.override = False
    assert window.at_boundary is False
    window.override = None
    assert window.at_boundary is False


def test_a_micro_batch_needs_a_backward():
    window = Accumulation(1)
    with pytest.raises(EngineError, match=r"step\(\) without a backward") as caught:
        window.advance()
    assert caught.value.where == "micro-batch 0"
    assert window.micro_steps == 0
    window.backwards = 5
    window.advance()
    with pytest.raises(EngineError, match="without a backward"):
        window.advance()


@given(st.floats(1e-3, 1e3), st.floats(0, 1e6), st.sampled_from([1.0, 2.0, 2.0**16, 0.5]))
def test_clipping_is_that_of_clip_grad_norm(max_norm, norm, scale):
    # A gradient of one element has its size as norm; it carries the loss scale.
    gradient = torch.tensor([norm], dtype=torch.float64)
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    param.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([param], max_norm)
    factor = Clip(max_norm).factor(norm * scale, scale)
    assert gradient.item() * scale * factor == pytest.approx(param.grad.item(), rel=1e-12)


def test_a_small_norm_is_only_unscaled():
    assert Clip(1.0).factor(0.0, 1.0) == 1.0
    assert Clip(1.0).factor(0.5, 1.0) == 1.0
    assert Clip(1.0).factor(0.5 * 8, 8.0) == 1 / 8


@pytest.mark.parametrize("max_norm", [0.0, -1.0])
def test_clipping_can_be_off(max_norm):
    assert Clip(max_norm).factor(1e30, 4.0) == 0.25
    assert Clip(max_norm).factor(math.nan, 1.0) == 1.0


def test_a_norm_that_is_not_finite_shows():
    assert math.isnan(Clip(1.0).factor(math.nan, 1.0))
    assert Clip(1.0).factor(math.inf, 1.0) == 0.0


def test_the_norm_is_the_root():
    assert global_norm(SquaredNorm(torch.tensor(25.0, dtype=torch.float64))) == 5.0
    assert global_norm(SquaredNorm(torch.tensor(0.0))) == 0.0
    assert global_norm(SquaredNorm(torch.tensor(math.inf))) == math.inf
    assert math.isnan(global_norm(SquaredNorm(torch.tensor(math.nan))))


class Metric:
    def __init__(self) -> None:
        self.seen: list[float] = []

    def step(self, metrics: float) -> None:
        self.seen.append(metrics)


def test_a_schedule_gets_the_callers_arguments():
    schedule = Metric()
    step = ScheduleStep(schedule)
    step.step(metrics=0.5)
    assert schedule.seen == [0.5]
    with pytest.raises(EngineError, match=r"Metric\.step\(\) refused its arguments") as caught:
        step.step()
    assert "metrics" in str(caught.value)
    assert caught.value.where == "engine.step(lr_kwargs={})"
    step.schedule = None
    step.step()
    assert schedule.seen == [0.5]


class Broken:
    def step(self) -> None:
        len(3)  # type: ignore[arg-type]


def test_a_mistake_inside_a_schedule_is_not_taken_for_wrong_arguments():
    with pytest.raises(TypeError, match="has no len"):
        ScheduleStep(Broken()).step()
