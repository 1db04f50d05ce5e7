"""Fp32: nothing is cast unless the configuration says so, nothing is skipped."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ds_core.config import load_config
from ds_core.interfaces.precision import PrecisionPlan
from ds_core.precision.fp32 import Fp32
from ds_core.precision.plans import plan_for


def fp32(**values: Any) -> Fp32:
    return Fp32(load_config({"train_batch_size": 1, **values}))


def test_everything_stays_as_it_is() -> None:
    assert fp32().plan == PrecisionPlan()


def test_keys_that_hold_for_every_precision() -> None:
    precision = fp32(
        data_types={"grad_accum_dtype": "bf16", "buffer_dtype": "fp16"}, communication_data_type="torch.float16"
    )
    assert precision.plan == plan_for(precision.config)
    assert precision.plan == PrecisionPlan(
        accumulate=torch.bfloat16, buffer=torch.float16, reduce=torch.float16, reduce_in=None
    )


def test_a_dtype_of_weights_that_is_given_is_theirs() -> None:
    plan = fp32(data_types={"param_dtype": "fp32"}).plan
    assert plan == PrecisionPlan(stored=torch.float32)
    layer = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    assert {dtypes.stored for dtypes in plan.dtypes_of(layer).values()} == {torch.float32}


def test_the_plan_is_made_once() -> None:
    precision = fp32()
    assert precision.plan is precision.plan


@pytest.mark.parametrize("norm", [0.0, 1.0, math.inf, math.nan])
def test_no_step_is_skipped(norm: float) -> None:
    precision = fp32()
    assert not precision.skips_overflow
    assert precision.overflowed(norm) is False
