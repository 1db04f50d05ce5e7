"""Masters: whose bits they are, whose gradients they get, and what is cast when."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_core.errors import ConfigError
from ds_core.interfaces.precision import PrecisionPlan
from ds_core.partition.stored import Masters, cast_stored

HALVES = [torch.float16, torch.bfloat16]


class Mixed(nn.Module):
    """Parameters given in several dtypes, one frozen, one shared, one of whole numbers; two buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.full = nn.Linear(3, 2)
        self.low = nn.Linear(3, 2).to(torch.bfloat16)
        self.shared = self.full
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.index = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("mean", torch.ones(2))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))


def stored(module: nn.Module, plan: PrecisionPlan) -> Masters:
    dtypes = plan.dtypes_of(module)
    masters = Masters([param for param in module.parameters() if param.requires_grad], dtypes)
    cast_stored(module, dtypes, plan)
    return masters


def plan_of(dtype: torch.dtype, **more: torch.dtype) -> PrecisionPlan:
    return PrecisionPlan(stored=dtype, master=torch.float32, **more)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_master_has_the_bits_that_were_given(dtype):
    module = Mixed()
    given = {name: param.detach().clone() for name, param in module.named_parameters()}
    storage = module.full.weight.data_ptr()
    masters = stored(module, plan_of(dtype))
    for name, param in module.named_parameters():
        if param.requires_grad:
            master = masters.of(param)
            assert master.dtype == torch.float32
            assert torch.equal(master, given[name].float())
            assert torch.equal(param, given[name].float().to(dtype))
            assert master.requires_grad, "optimizers look at it"
    assert masters.of(module.full.weight).data_ptr() == storage, "not even copied"


@pytest.mark.parametrize("dtype", HALVES)
def test_floating_parameters_are_cast_and_buffers_are_not(dtype):
    module = Mixed()
    objects = list(module.parameters())
    stored(module, plan_of(dtype))
    assert all(one is other for one, other in zip(objects, module.parameters(), strict=True))
    assert {name: param.dtype for name, param in module.named_parameters()} == {
        "full.weight": dtype,
        "full.bias": dtype,
        "low.weight": dtype,
        "low.bias": dtype,
        "frozen": dtype,
        "index": torch.int64,
    }
    assert (module.mean.dtype, module.count.dtype) == (torch.float32, torch.int64)


def test_buffers_are_cast_where_the_plan_says_so():
    module = Mixed()
    stored(module, plan_of(torch.bfloat16, buffer=torch.bfloat16))
    assert (module.mean.dtype, module.count.dtype) == (torch.bfloat16, torch.int64)
    assert dict(module.named_buffers())["mean"] is module.mean


def test_a_buffer_that_modules_share_is_cast_once():
    module = Mixed()
    module.full.register_buffer("also", module.mean)
    stored(module, plan_of(torch.bfloat16, buffer=torch.bfloat16))
    assert module.full.also is module.mean
    assert [name for name, _ in module.named_buffers()] == ["mean", "count"]


def test_without_a_stored_dtype_nothing_is_cast_and_only_others_than_the_masters_dtype_have_one():
    module = Mixed()
    masters = stored(module, PrecisionPlan(master=torch.float32))
    assert module.low.weight.dtype == torch.bfloat16
    assert masters.of(module.full.weight) is module.full.weight
    assert masters.of(module.low.weight).dtype == torch.float32
    assert len(masters) == 2


def test_publish_and_refresh():
    module = nn.Linear(2, 2)
    masters = stored(module, plan_of(torch.bfloat16))
    master = masters.of(module.weight)
    with torch.no_grad():
        master.fill_(1 + 2**-12)
    masters.publish()
    assert torch.equal(module.weight, torch.ones(2, 2, dtype=torch.bfloat16)), "rounded"
    with torch.no_grad():
        module.weight.fill_(3.0)
    masters.refresh()
    assert torch.equal(master, torch.full((2, 2), 3.0))


def test_a_master_keeps_its_digits_where_the_parameter_was_not_written_to():
    module = nn.Linear(2, 2)
    masters = stored(module, plan_of(torch.bfloat16))
    given = masters.of(module.weight).clone()
    with torch.no_grad():
        module.bias.fill_(3.0)
    masters.refresh()
    assert torch.equal(masters.of(module.weight), given)
    assert not torch.equal(given, module.weight.float()), "they are digits that the parameter does not have"
    assert masters.of(module.bias).tolist() == [3.0, 3.0]


def test_a_parameter_that_is_not_a_number_reaches_its_master():
    module = nn.Linear(2, 2)
    masters = stored(module, plan_of(torch.bfloat16))
    with torch.no_grad():
        module.weight[0, 0] = float("nan")
    masters.refresh()
    assert masters.of(module.weight).isnan().sum() == 1


def test_gradients_are_copied_only_into_another_dtype():
    module = nn.Linear(2, 2)
    masters = stored(module, plan_of(torch.bfloat16))
    module.weight.grad = torch.full((2, 2), 0.5, dtype=torch.bfloat16)
    module.bias.grad_dtype = torch.float32
    module.bias.grad = torch.ones(2)
    masters.take_gradients()
    assert torch.equal(masters.of(module.weight).grad, torch.full((2, 2), 0.5))
    assert masters.of(module.bias).grad is module.bias.grad
    module.weight.grad = None
    masters.take_gradients()
    assert masters.of(module.weight).grad is None, "unused: the optimizer must leave it alone"
    masters.drop_gradients()
    assert masters.of(module.bias).grad is None


def test_dtypes_are_those_of_the_plan_for_each_parameter():
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    plan = PrecisionPlan(reduce=torch.bfloat16, reduce_in=(nn.Linear,), accumulate=torch.float32)
    found = plan.dtypes_of(module)
    assert [of.reduce for of in found.values()] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert {of.master for of in found.values()} == {None}
    assert {of.updated for of in found.values()} == {torch.float32}


def test_gradients_the_optimizer_could_not_read_are_refused():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(torch.bfloat16))
    with pytest.raises(ConfigError) as raised:
        PrecisionPlan(accumulate=torch.float32).dtypes_of(module)
    assert str(raised.value) == (
        "gradients cannot accumulate in torch.float32 for a parameter that is trained in torch.bfloat16 without a "
        "master\n"
        "  where: data_types.grad_accum_dtype, parameter '1.weight'\n"
        "  fix: leave grad_accum_dtype out, or enable fp16 or bf16, which keep masters"
    )
    module[1].requires_grad_(False)
    PrecisionPlan(accumulate=torch.float32).dtypes_of(module)


def test_a_nan_costs_no_other_element_its_digits():
    module = nn.Linear(3, 1)
    masters = stored(module, plan_of(torch.bfloat16))
    given = masters.of(module.weight).detach().clone()
    with torch.no_grad():
        module.weight[0, 1] = float("nan")
    masters.refresh()
    master = masters.of(module.weight).detach()
    assert master[0, 1].isnan()
    assert torch.equal(master[0, [0, 2]], given[0, [0, 2]])
    assert not torch.equal(given[0, [0, 2]], module.weight[0, [0, 2]].float()), "digits that the weight does not have"
