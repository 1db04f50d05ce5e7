"""Optimizers of the client: what becomes of their groups and their state; adding groups without other ranks."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import ds_core
from ds_core.errors import ConfigError, EngineError
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here

CONFIG = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0}


class Wrapper(torch.optim.Optimizer):
    """Shares groups and state with the optimizer inside of it, as such wrappers do."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.defaults, self.param_groups, self.state = inner.defaults, inner.param_groups, inner.state

    def step(self, closure: None = None) -> None:
        self.inner.step()


def train(engine: ds_core.DeepSpeedEngine) -> None:
    engine.backward(engine(torch.ones(1, 2)).sum())
    engine.step()


def test_lists_shared_with_an_inner_optimizer_stay_shared():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    inner = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.5)
    engine = ds_core.initialize(model=model, optimizer=Wrapper(inner), config=CONFIG)[0]
    assert len(inner.param_groups) == 1
    before = model.weight.detach().clone()
    train(engine)
    assert torch.equal(model.weight, before - 0.5)


def test_state_of_frozen_parameters_is_let_go_and_state_of_none_is_kept():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.state["mine"]["count"] = 3
    moment = optimizer.state[model.weight]["exp_avg"]
    model.bias.requires_grad_(False)
    ds_core.initialize(model=model, optimizer=optimizer, config=CONFIG)
    assert set(optimizer.state) == {"mine", model.weight}
    assert optimizer.state["mine"] == {"count": 3}
    assert optimizer.state[model.weight]["exp_avg"] is moment


def test_a_group_is_added_to_the_optimizer_of_the_configuration():
    model = nn.Linear(2, 1)
    config = {**CONFIG, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}}
    engine, optimizer, _, _ = ds_core.initialize(model=model, model_parameters=[model.weight], config=config)
    optimizer.add_param_group({"params": [model.bias], "lr": 0.25})
    before = model.bias.detach().clone()
    train(engine)
    assert torch.equal(model.bias, before - 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    with pytest.raises(EngineError, match=r"after 1 steps(?s:.)*add it before training"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_a_window_that_has_begun_is_no_time_for_a_group():
    model = nn.Linear(2, 1)
    engine, optimizer, _, _ = ds_core.initialize(
        model=model, optimizer=torch.optim.SGD([model.weight], lr=0.5), config=CONFIG
    )
    engine.backward(engine(torch.ones(1, 2)).sum())
    with pytest.raises(EngineError, match="before the first backward"):
        optimizer.add_param_group({"params": [model.bias]})
    assert len(optimizer.param_groups) == 1


def test_a_group_that_the_schedule_or_the_optimizer_refuses_leaves_all_as_it_was():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD([model.weight], lr=0.5)
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": [0.5], "warmup_min_lr": 0.5}}
    engine = ds_core.initialize(model=model, optimizer=optimizer, config={**CONFIG, "scheduler": warmup})[0]
    with pytest.raises(ConfigError, match="warmup_max_lr has 1 values"):
        optimizer.add_param_group({"params": [model.bias]})
    with pytest.raises(ValueError, match="with names"):
        optimizer.add_param_group({"params": [("bias", model.bias)]})
    before = model.weight.detach().clone(), model.bias.detach().clone()
    train(engine)
    assert torch.equal(model.weight, before[0] - 0.5)
    assert torch.equal(model.bias, before[1])
    assert len(optimizer.param_groups) == 1


def test_named_parameters_are_added_with_their_names():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD([("weight", model.weight)], lr=0.5)
    engine = ds_core.initialize(model=model, optimizer=optimizer, config=CONFIG)[0]
    optimizer.add_param_group({"params": [("bias", model.bias)]})
    before = model.bias.detach().clone()
    train(engine)
    assert torch.equal(model.bias, before - 0.5)
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"], ["bias"]]


def test_an_optimizer_outlives_its_engine_and_is_torchs_own_then():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD([model.weight], lr=0.5)
    engine = ds_core.initialize(model=model, optimizer=optimizer, config=CONFIG)[0]
    assert len(copy.deepcopy(optimizer).param_groups) == 1
    engine.destroy()
    optimizer.add_param_group({"params": [model.bias]})
    assert len(optimizer.param_groups) == 2
    gone = weakref.ref(optimizer)
    del optimizer, engine
    gc.collect()
    assert gone() is None
