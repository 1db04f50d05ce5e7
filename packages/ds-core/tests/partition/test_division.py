"""Where gradients are divided, and that the whole is the mean or the sum; on ranks it is part of the contract."""

from __future__ import annotations

import math
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_core.config import load_config
from ds_core.interfaces.precision import PrecisionPlan
from ds_core.partition.division import Division, divide, division_of
from ds_core.partition.replicated import ReplicatedPartition
from ds_core.testing.partition import check_divisions
from ds_core.testing.ranks import run_ranks

worlds = st.integers(1, 4096)
factors = st.floats(2**-20, 2**20)


@given(world_size=worlds, predivide=factors, is_prescaled=st.booleans())
def test_both_factors_make_the_mean(world_size, predivide, is_prescaled):
    division = divide(world_size, predivide=predivide, is_prescaled=is_prescaled)
    # Each factor is rounded once, and their product once more.
    assert math.isclose(division.before * division.after, 1 / world_size, rel_tol=2**-51)
    if world_size > 1 and not is_prescaled and predivide != 1:
        assert division.before == 1 / predivide
    else:
        assert division == Division(1 / world_size, 1.0)


@given(world_size=worlds, predivide=factors, is_prescaled=st.booleans())
def test_a_sum_is_not_divided(world_size, predivide, is_prescaled):
    assert divide(world_size, is_mean=False, predivide=predivide, is_prescaled=is_prescaled) == Division(1.0, 1.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Division(0.25, 1.0)),
        ({"prescale_gradients": True}, Division(0.25, 1.0)),
        ({"gradient_predivide_factor": 8}, Division(0.125, 2.0)),
        ({"gradient_predivide_factor": 8, "prescale_gradients": True}, Division(0.25, 1.0)),
        ({"gradient_predivide_factor": 8, "gradient_allreduce_op": "Sum"}, Division(1.0, 1.0)),
    ],
)
def test_the_configuration_says_which(given, expected):
    assert division_of(load_config({"train_batch_size": 4, **given}, dp_world_size=4), 4) == expected


def test_on_three_ranks():
    run_ranks([partial(check_divisions, ReplicatedPartition, {}, PrecisionPlan())], 3)
