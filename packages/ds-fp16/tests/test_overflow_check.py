"""The check for overflow: exact in every dtype, and agreed by the ranks that are asked."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_core.errors import EngineError, NotBuiltError
from ds_core.testing.ranks import run_ranks
from ds_fp16 import norms
from ds_fp16.overflow_check import CheckOverflow

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BAD = [math.inf, -math.inf, math.nan]


def _param(values: Any, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    param = nn.Parameter(torch.zeros(torch.as_tensor(values).shape, dtype=dtype))
    param.grad = torch.as_tensor(values, dtype=dtype)
    return param


def test_it_is_where_deepspeed_has_it() -> None:
    assert norms.CheckOverflow is CheckOverflow


@pytest.mark.parametrize("dtype", DTYPES)
class TestOneRank:
    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("place", [0, 1234, 2999])
    def test_one_bad_element_anywhere(self, place: int, bad: float, dtype: torch.dtype) -> None:
        values = torch.ones(3000)
        values[place] = bad
        params = [_param([1.0], dtype), _param(values.view(30, 100), dtype)]
        assert CheckOverflow().has_overflow(params) is True
        assert CheckOverflow().has_overflow_serial(iter(params)) is True
        assert CheckOverflow._has_inf_or_nan(params[1].grad, 1) is True
        assert CheckOverflow._has_inf_or_nan(params[0].grad) is False

    def test_the_largest_finite_numbers_are_none(self, dtype: torch.dtype) -> None:
        largest = torch.finfo(dtype).max
        params = [_param(torch.full((5000,), sign * largest, dtype=torch.float64), dtype) for sign in (1, -1)]
        assert params[0].grad.isfinite().all()
        assert CheckOverflow().has_overflow(params) is False
        assert CheckOverflow().has_overflow([*params, _param([math.nan], dtype)]) is True

    def test_nothing_to_look_at(self, dtype: torch.dtype) -> None:
        without = nn.Parameter(torch.full((2,), math.inf, dtype=dtype))
        assert CheckOverflow().has_overflow([]) is False
        assert CheckOverflow().has_overflow([without, _param(torch.empty(0), dtype)]) is False
        assert CheckOverflow._has_inf_or_nan(torch.empty(0, dtype=dtype)) is False

    @settings(max_examples=60, deadline=None)
    @given(values=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=8))
    def test_it_equals_isfinite(self, values: list[float], dtype: torch.dtype) -> None:
        # What is out of a dtype's range is inf in it.
        param = _param(torch.tensor(values, dtype=torch.float64).to(dtype), dtype)
        assert CheckOverflow().has_overflow([param]) is not bool(param.grad.isfinite().all())


class TestCheck:
    def test_groups_are_lists_or_dictionaries(self) -> None:
        good, bad = _param([1.0]), _param([math.inf])
        assert CheckOverflow([[good], [bad]]).check() is True
        assert CheckOverflow([{"params": [good], "lr": 1.0}, {"params": bad}]).check() is True
        assert CheckOverflow([[good]]).check() is False
        assert CheckOverflow([[good]]).check([[bad]]) is True
        assert CheckOverflow([[bad]]).check([[good]]) is False
        assert CheckOverflow(torch.optim.SGD([good, bad]).param_groups).check() is True
        assert CheckOverflow([]).check() is False

    def test_without_parameters_it_says_so(self) -> None:
        with pytest.raises(EngineError, match="no parameters to check"):
            CheckOverflow().check()

    def test_it_looks_at_the_gradients_of_now(self) -> None:
        param = _param([1.0])
        checker = CheckOverflow([[param]])
        assert checker.check() is False
        param.grad.fill_(math.nan)
        assert checker.check() is True

    def test_the_log_names_the_gradient(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.DEBUG, logger="ds_core"):
            CheckOverflow().has_overflow([nn.Parameter(torch.ones(1)), _param([1.0]), _param([[math.nan]])])
        assert [record.message for record in caplog.records] == ["gradient 2, shape (1, 1), holds inf or NaN"]

    @pytest.mark.parametrize(
        ("group", "expected"),
        [
            ([], False),
            ([0.0, 3.0], False),
            ([3.0, -1.0], True),
            ([-1], True),
            ([torch.tensor(2.0), torch.tensor(-1.0)], True),
            ([torch.tensor([5.0])], False),
            ([math.inf], True),
            ([math.nan], True),
        ],
    )
    def test_check_using_norm(self, group: list[Any], expected: bool) -> None:
        assert CheckOverflow().check_using_norm(group) is expected
        assert CheckOverflow().check_using_norm(group, reduce_overflow=False) is expected

    def test_experts_in_one_process_need_no_group(self) -> None:
        expert = _param([math.inf])
        expert.allreduce, expert.group_name = False, "ep_size_1"
        checker = CheckOverflow([[expert]])
        assert checker.has_moe_params is True
        assert checker.check() is True
        assert CheckOverflow([[_param([1.0])]]).has_moe_params is False

    def test_experts_that_are_not_there(self) -> None:
        with pytest.raises(EngineError, match="no parameter is an expert's"):
            CheckOverflow().has_overflow([_param([1.0])], has_moe_params=True)


class FakeMpu:
    """A model-parallel, a data-parallel and an expert group; those that are not ``wide`` hold this rank alone."""

    def __init__(self, *wide: str) -> None:
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
        self.groups = {kind: dist.group.WORLD if kind in wide else alone for kind in ("model", "data", "expert")}

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.groups["model"])

    def get_model_parallel_group(self) -> Any:
        return self.groups["model"]

    def get_data_parallel_group(self) -> Any:
        return self.groups["data"]

    def get_expert_parallel_group(self, name: str) -> Any:
        assert name == "ep_size_2"
        return self.groups["expert"]


def _params(expert: bool = False) -> list[nn.Parameter]:
    """Rank 1 overflows, in its expert if it has one; rank 0 does not."""
    param = _param([math.inf if dist.get_rank() else 1.0])
    if expert:
        param.allreduce, param.group_name = False, "ep_size_2"
    return [param]


def _who_hears_of_it() -> dict[str, bool]:
    unreduced = SimpleNamespace(enable_backward_allreduce=False)
    reduced = SimpleNamespace(enable_backward_allreduce=True)
    return {
        "nobody": CheckOverflow().has_overflow(_params()),
        "nobody, reduced": CheckOverflow(deepspeed=reduced).has_overflow(_params()),
        "all, not reduced": CheckOverflow(deepspeed=unreduced).has_overflow(_params()),
        "all, zero": CheckOverflow([_params()], zero_reduce_scatter=True).check(),
        "all, zero beside mpu": CheckOverflow(mpu=FakeMpu(), zero_reduce_scatter=True).has_overflow(_params()),
        "model": CheckOverflow(mpu=FakeMpu("model")).has_overflow(_params()),
        "model of one": CheckOverflow(mpu=FakeMpu()).has_overflow(_params()),
        "data, reduced": CheckOverflow(mpu=FakeMpu("data"), deepspeed=reduced).has_overflow(_params()),
        "data, not reduced": CheckOverflow(mpu=FakeMpu("data"), deepspeed=unreduced).has_overflow(_params()),
        "expert": CheckOverflow(mpu=FakeMpu("expert")).has_overflow(_params(expert=True)),
        "expert, asked for": CheckOverflow(mpu=FakeMpu("expert")).has_overflow(_params(expert=True), True),
        "expert, not asked": CheckOverflow(mpu=FakeMpu("expert")).has_overflow(_params(expert=True), False),
        "no gradients here": CheckOverflow(zero_reduce_scatter=True).has_overflow(_params() if dist.get_rank() else []),
    }


def _who_hears_of_a_norm() -> dict[str, bool]:
    norm = [-1.0 if dist.get_rank() else 2.0]
    return {
        "all": CheckOverflow().check_using_norm(norm),
        "nobody": CheckOverflow().check_using_norm(norm, reduce_overflow=False),
        "model": CheckOverflow(mpu=FakeMpu("model")).check_using_norm(norm),
        "model of one": CheckOverflow(mpu=FakeMpu()).check_using_norm(norm),
        "expert": CheckOverflow([_params(expert=True)], mpu=FakeMpu("expert")).check_using_norm(norm),
    }


def _nobody_overflows() -> list[bool]:
    param = _param([6e4], torch.float16)
    return [CheckOverflow(zero_reduce_scatter=True).has_overflow([param]), CheckOverflow().check_using_norm([1.0])]


def _experts_nobody_knows() -> str:
    try:
        CheckOverflow().has_overflow(_params(expert=True))
    except NotBuiltError as error:
        return str(error)
    return "no error"


def test_two_ranks() -> None:
    params, by_norm, none, unknown = run_ranks(
        [_who_hears_of_it, _who_hears_of_a_norm, _nobody_overflows, _experts_nobody_knows], 2
    )
    assert all(params[1].values())  # rank 1 always knows its own
    not_told = {"nobody", "nobody, reduced", "model of one", "data, reduced", "expert, not asked"}
    assert {name for name, heard in params[0].items() if not heard} == not_told
    assert all(by_norm[1].values())
    assert {name for name, heard in by_norm[0].items() if not heard} == {"nobody", "model of one"}
    assert none == [[False, False], [False, False]]
    for text in unknown:
        assert "expert group 'ep_size_2' is not built yet" in text
