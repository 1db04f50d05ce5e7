"""Forward in a plan's precision: what is cast, and whose autocast holds."""

from __future__ import annotations

import logging
from typing import NamedTuple

import pytest
import torch
from torch import nn

from ds_core.engine.forward import build_forward, plan_autocast
from ds_core.interfaces.precision import PrecisionPlan

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Pair(NamedTuple):
    x: torch.Tensor
    index: torch.Tensor


class Dtypes(nn.Module):
    """Returns the dtypes of what it is given."""

    def forward(self, *args, **kwargs):
        return args, kwargs


def test_floating_inputs_are_cast_wherever_they_are():
    forward = build_forward(Dtypes(), PrecisionPlan(input_cast=FP16), CPU)
    x, index = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.int64)
    (first, pair, deep), found = forward(
        x, Pair(x, index), [{"x": (x,)}, None, "word"], mask=index.bool(), extra={"x": x}
    )
    assert first.dtype == FP16
    assert type(pair) is Pair
    assert (pair.x.dtype, pair.index.dtype) == (FP16, torch.int64)
    assert deep[0]["x"][0].dtype == FP16
    assert deep[1:] == [None, "word"]
    assert (found["mask"].dtype, found["extra"]["x"].dtype) == (torch.bool, FP16)
    assert x.dtype == torch.float64, "the caller's own stays"


def test_a_gradient_passes_through_the_cast():
    forward = build_forward(nn.Linear(2, 1).to(FP16), PrecisionPlan(input_cast=FP16), CPU)
    x = torch.ones(1, 2, requires_grad=True)
    forward(x).sum().backward()
    assert x.grad.dtype == FP32


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_forward_runs_under_the_plans_autocast(dtype):
    linear = nn.Linear(2, 1)
    forward = build_forward(linear, PrecisionPlan(autocast=dtype), CPU)
    assert forward(torch.ones(1, 2)).dtype == dtype
    assert linear(torch.ones(1, 2)).dtype == FP32
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("plan", "outer"), [(None, BF16), (BF16, FP16), (FP16, BF16)])
def test_the_plans_word_holds_inside_the_callers_autocast(plan, outer, caplog):
    linear, x = nn.Linear(2, 1), torch.ones(1, 2)
    forward = build_forward(linear, PrecisionPlan(autocast=plan), CPU)
    with caplog.at_level(logging.INFO, logger="ds_core"), torch.autocast("cpu", dtype=outer):
        # In both orders: torch keeps weights that an autocast has cast, and does not ask in which dtype.
        assert linear(x).dtype == outer
        assert forward(x).dtype == (plan or FP32)
        assert linear(x).dtype == outer
        assert forward(x).dtype == (plan or FP32)
    [record] = caplog.records
    assert str(outer) in record.message
    assert record.levelno == (logging.INFO if plan else logging.WARNING)


@pytest.mark.parametrize("dtype", [None, BF16])
def test_nothing_is_said_where_both_agree(dtype, caplog):
    forward = build_forward(nn.Linear(2, 1), PrecisionPlan(autocast=dtype), CPU)
    with caplog.at_level(logging.INFO, logger="ds_core"), torch.autocast("cpu", dtype=BF16, enabled=dtype is not None):
        forward(torch.ones(1, 2))
    assert caplog.records == []


def test_an_engine_says_once_for_itself(caplog):
    first, second = (build_forward(nn.Linear(2, 1), PrecisionPlan(), CPU) for _ in range(2))
    with caplog.at_level(logging.INFO, logger="ds_core"), torch.autocast("cpu", dtype=BF16):
        for forward in (first, first, second):
            forward(torch.ones(1, 2))
    assert len(caplog.records) == 2


@pytest.mark.parametrize("plan", [None, BF16, FP16])
@pytest.mark.parametrize("outer", [None, BF16, FP16])
def test_the_context_tells_of_another_autocast_at_each_entry(plan, outer):
    linear, x, told = nn.Linear(2, 1), torch.ones(1, 2), []
    with torch.autocast("cpu", dtype=outer, enabled=outer is not None):
        for _ in range(2):
            with plan_autocast(plan, "cpu", told.append):
                assert linear(x).dtype == (plan or FP32)
            with plan_autocast(plan, "cpu"):
                assert linear(x).dtype == (plan or FP32)
            assert linear(x).dtype == (outer or FP32)
    assert told == ([outer] * 2 if outer not in (None, plan) else [])
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("cached", [True, False])
def test_a_cache_that_the_caller_switched_off_stays_off(cached):
    with torch.autocast("cpu", dtype=BF16, cache_enabled=cached), plan_autocast(BF16, "cpu"):
        assert torch.is_autocast_cache_enabled() is cached


def test_without_any_autocast_no_context_is_entered(monkeypatch):
    forward = build_forward(nn.Linear(2, 1), PrecisionPlan(), CPU)
    monkeypatch.setattr("ds_core.engine.forward.plan_autocast", lambda *args: pytest.fail("a context was made"))
    assert forward(torch.ones(1, 2)).dtype == FP32
