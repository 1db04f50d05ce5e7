"""Gradients of the only rank: left where autograd puts them, and the states of one backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_core.errors import EngineError, NotBuiltError
from ds_core.interfaces.precision import PrecisionPlan
from ds_core.partition.window import LocalGradients


def local(module: nn.Module) -> LocalGradients:
    names = {param: name for name, param in module.named_parameters()}
    return LocalGradients(list(names), names, PrecisionPlan().dtypes_of(module))


def backward(gradients: LocalGradients, loss: torch.Tensor) -> None:
    gradients.begin(reduce=True)
    loss.backward()
    gradients.end()


def test_gradients_stay_where_autograd_leaves_them_and_add_up():
    module = nn.Linear(2, 1)
    gradients = local(module)
    backward(gradients, module(torch.ones(1, 2)).sum())
    first = module.weight.grad
    backward(gradients, module(torch.ones(1, 2)).sum())
    assert module.weight.grad is first
    gradients.wait()
    assert first.tolist() == [[2.0, 2.0]]
    assert [flat.data_ptr() for flat in gradients.flats()] == [p.grad.data_ptr() for p in module.parameters()]


def test_an_unused_parameter_has_no_gradient_and_no_part_in_the_norm():
    module = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    gradients = local(module)
    backward(gradients, module[0](torch.ones(1, 2)).sum())
    assert module[1].weight.grad is None
    assert len(gradients.flats()) == 2


def test_a_gradient_outside_a_backward_of_the_engine_is_refused():
    module = nn.Linear(2, 1)
    gradients = local(module)
    for _ in range(2):  # before the first backward, and after one
        with pytest.raises(EngineError, match="outside this engine's backward") as caught:
            module(torch.ones(1, 2)).sum().backward()
        assert caught.value.fix.startswith("call engine.backward(loss)")
        gradients.clear()
        backward(gradients, module(torch.ones(1, 2)).sum())


def test_after_an_abort_the_window_must_be_cleared():
    module = nn.Linear(2, 1)
    gradients = local(module)
    gradients.begin(reduce=False)
    gradients.abort()
    with pytest.raises(EngineError, match="the backward before this one raised") as caught:
        gradients.begin(reduce=True)
    assert "zero_grad" in caught.value.fix
    gradients.clear()
    backward(gradients, module(torch.ones(1, 2)).sum())
    assert module.weight.grad.tolist() == [[1.0, 1.0]]


def test_clearing_and_restoring():
    module = nn.Linear(2, 1)
    gradients = local(module)
    backward(gradients, module(torch.ones(1, 2)).sum())
    given = torch.full((1, 2), 3.0)
    gradients.restore({module.weight: given})
    assert module.bias.grad is None
    backward(gradients, module(torch.ones(1, 2)).sum())
    assert module.weight.grad.tolist() == [[4.0, 4.0]]
    assert given.tolist() == [[3.0, 3.0]]
    gradients.clear()
    assert gradients.flats() == []


def test_a_sparse_gradient_is_refused_with_its_parameter():
    module = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    gradients = local(module)
    backward(gradients, module(torch.tensor([1, 2])).sum())
    with pytest.raises(NotBuiltError, match="sparse") as caught:
        gradients.flats()
    assert caught.value.where == "parameter '0.weight'"


def test_detaching_leaves_plain_pytorch():
    module = nn.Linear(2, 1)
    gradients = local(module)
    backward(gradients, module(torch.ones(1, 2)).sum())
    gradients.detach()
    gradients.detach()
    assert all(param.grad is None and not param._post_accumulate_grad_hooks for param in module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    assert module.weight.grad.tolist() == [[1.0, 1.0]]
