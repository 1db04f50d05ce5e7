"""Weights in flat memory: where they lie, what follows whom, and what autograd is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_core import comm
from ds_core.interfaces.precision import PrecisionPlan
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_zero.layout import cut
from ds_zero.weights import ShardedWeights

MASTERS = PrecisionPlan(stored=torch.bfloat16, master=torch.float32)


def weights(module: nn.Module, plan: PrecisionPlan, *, keep_shapes: bool = False) -> ShardedWeights:
    comm.init_distributed()
    group = torch.distributed.group.WORLD
    assert group is not None
    params = list(module.parameters())
    layout = cut([param.numel() for param in params], 1)
    found = ShardedWeights([(params, layout)], plan.dtypes_of(module), group, keep_shapes=keep_shapes)
    found.note_versions()
    return found


@pytest.fixture
def module() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_parameters_are_views_of_one_tensor_with_the_values_they_had(module):
    before = [param.detach().clone() for param in module.parameters()]
    found = weights(module, PrecisionPlan())
    assert [param.data_ptr() for param in module.parameters()] == [
        module.weight.data_ptr(),
        module.weight.data_ptr() + 6 * 4,
    ]
    assert all(map(torch.equal, module.parameters(), before))
    for param, shard in found.shards.items():
        assert not shard.has_master
        assert shard.updated.data_ptr() == param.data_ptr()
        assert shard.updated.shape == (param.numel(),)
        assert shard.updated.requires_grad


def test_masters_keep_the_digits_that_weights_lose(module):
    before = {param: param.detach().clone() for param in module.parameters()}
    found = weights(module, MASTERS)
    for param, shard in found.shards.items():
        assert shard.has_master
        assert torch.equal(shard.updated.detach().view(param.shape), before[param])
        assert torch.equal(param.detach(), before[param].to(torch.bfloat16))


def test_marks_and_shapes_are_those_of_the_parameter(module):
    module.weight.use_muon = True
    found = weights(module, MASTERS, keep_shapes=True)
    assert found.shards[module.weight].updated.use_muon is True
    assert found.shards[module.weight].updated.shape == (2, 3)


def test_publishing_casts_and_tells_autograd(module):
    found = weights(module, MASTERS)
    loss = module(torch.ones(1, 3, dtype=torch.bfloat16, requires_grad=True)).sum()
    with torch.no_grad():
        found.shards[module.weight].updated.fill_(1.001)
    found.publish()
    assert torch.equal(module.weight, torch.full((2, 3), 1.001).to(torch.bfloat16))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_what_somebody_wrote_to_is_followed(module):
    found = weights(module, MASTERS)
    bias = found.shards[module.bias].updated.detach().clone()
    found.follow_writes()
    with torch.no_grad():
        module.weight.fill_(0.5)
    found.follow_writes()
    assert found.shards[module.weight].updated.tolist() == [0.5] * 6
    assert torch.equal(found.shards[module.bias].updated, bias), "with the digits it had"
    found.publish()
    found.follow_writes()
    assert torch.equal(found.shards[module.bias].updated, bias), "our own writes are nobody else's"


def test_a_refresh_finds_writes_that_torch_does_not_count(module):
    found = weights(module, MASTERS)
    bias = found.shards[module.bias].updated.detach().clone()
    module.weight.data.fill_(0.25)
    found.follow_writes()
    assert found.shards[module.weight].updated.tolist() != [0.25] * 6
    found.refresh()
    assert found.shards[module.weight].updated.tolist() == [0.25] * 6
    assert torch.equal(found.shards[module.bias].updated, bias)


def test_a_nan_costs_no_other_element_its_digits(module):
    found = weights(module, MASTERS)
    given = found.shards[module.weight].updated.detach().clone()
    with torch.no_grad():
        module.weight[0, 1] = float("nan")
        module.weight[1, 0] = 0.5
    for follow in (found.follow_writes, found.refresh):
        follow()
        now = found.shards[module.weight].updated.detach()
        assert now[1].isnan()
        assert now[3] == 0.5
        assert torch.equal(now[[0, 2, 4, 5]], given[[0, 2, 4, 5]])
