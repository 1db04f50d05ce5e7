"""What others do to a model that trains in low precision: writing to it, dropping it, building on it again."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.errors import ConfigError, EngineError

SGD = {"type": "SGD", "params": {"lr": 0.125}}


@pytest.fixture(autouse=True)
def leave_no_group():
    yield
    comm.destroy_process_group()


def start(model, *, optimizer=None, **sections):
    config = {"train_batch_size": 2, "gradient_clipping": 0.0, **({} if optimizer else {"optimizer": SGD}), **sections}
    return ds_core.initialize(model=model, optimizer=optimizer, config=config)[0]


BF16 = {"bf16": {"enabled": True}}


def step(engine, factor=1.0):
    x = torch.ones(1, 2, dtype=next(engine.module.parameters()).dtype)
    engine.backward(engine(x).float().sum() * factor)
    engine.step()


def masters(engine):
    return [tensor for group in engine.basic_optimizer.param_groups for tensor in group["params"]]


@pytest.mark.parametrize("before", [0, 2])
def test_a_write_in_place_stays(before):
    engine = start(nn.Linear(2, 1, bias=False), **BF16)
    for _ in range(before):
        step(engine)
    with torch.no_grad():
        engine.module.weight.fill_(5.0)
    step(engine)
    assert engine.module.weight.tolist() == [[4.875, 4.875]]
    engine.module.load_state_dict({"weight": torch.full((1, 2), 3.0)})
    step(engine, 0.0)
    assert engine.module.weight.tolist() == [[3.0, 3.0]]


def test_a_write_to_one_parameter_costs_the_others_no_digits():
    model = nn.Linear(2, 1)
    engine = start(model, **BF16)
    weight, _ = masters(engine)
    exact = weight.detach().clone()
    with torch.no_grad():
        model.bias.clamp_(max=-1.0)
    step(engine, 0.0)
    assert torch.equal(weight, exact)
    assert model.bias.item() <= -1.0


def test_a_write_through_data_needs_a_refresh():
    engine = start(nn.Linear(2, 1, bias=False), **BF16)
    engine.module.weight.data.fill_(5.0)
    engine.optimizer.refresh_fp32_params()
    step(engine, 0.0)
    assert engine.module.weight.tolist() == [[5.0, 5.0]]


def test_masters_look_like_their_parameters_to_an_optimizer():
    model = nn.Linear(2, 1)
    model.bias.lr_scale = 3
    seen = []

    def build(groups):
        seen.extend(groups[0]["params"])
        return torch.optim.SGD([param for param in groups[0]["params"] if param.requires_grad], lr=0.125)

    engine = start(model, optimizer=build, **BF16)
    assert [tensor.dtype for tensor in seen] == [torch.float32] * 2
    assert seen[1].lr_scale == 3
    before = model.weight.detach().clone()
    step(engine)
    assert not torch.equal(model.weight, before)


def test_an_optimizer_over_other_tensors_is_refused():
    model = nn.Linear(2, 1)
    with pytest.raises(ConfigError, match="was given 2 tensors to update, its optimizer has 0 of them and 2 others"):
        start(model, optimizer=lambda groups: torch.optim.SGD(model.parameters(), lr=0.1), **BF16)


@pytest.mark.parametrize("sections", [{}, BF16])
def test_parameters_added_later_are_refused(sections):
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    engine = start(model, **sections)
    step(engine)
    model.bias.requires_grad_(True)
    with pytest.raises(EngineError, match="a parameter group was added after 1 steps"):
        engine.basic_optimizer.add_param_group({"params": [model.bias]})
    model.bias.requires_grad_(False)
    others = [torch.zeros(1, requires_grad=True)]
    engine.basic_optimizer.param_groups.append({**engine.basic_optimizer.param_groups[0], "params": others})
    with pytest.raises(EngineError, match="the optimizer has 2 parameters, the engine was built with 1"):
        step(engine)


def test_gradients_from_before_are_forgotten():
    model = nn.Linear(2, 1, bias=False)
    model(torch.ones(1, 2)).sum().backward()
    engine = start(model, **BF16)
    step(engine)
    assert engine.get_global_grad_norm() == pytest.approx(2**0.5)


@pytest.mark.parametrize("sections", [{}, BF16, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}])
def test_an_engine_that_is_dropped_is_freed_and_the_model_is_as_any(sections):
    model = nn.Linear(2, 1)
    engine = start(model, **sections)
    step(engine)
    assert engine.optimizer is not None
    comm.destroy_process_group()  # it keeps engines to end in order
    gone = weakref.ref(engine.parts.partition)
    del engine
    gc.collect()
    assert gone() is None
    assert model.weight.grad_dtype == model.weight.dtype
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 2, dtype=model.weight.dtype)).sum().backward()
    optimizer.step()


def test_the_optimizers_face_stays_the_same_while_somebody_has_it():
    engine = start(nn.Linear(2, 1), **BF16)
    face = engine.optimizer
    assert engine.optimizer is face


def test_an_optimizer_that_an_engine_has_used_is_named():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start(model, optimizer=optimizer, **BF16).destroy()
    with pytest.raises(ConfigError, match="the optimizer updates a Tensor, expected parameters of the model"):
        start(model, optimizer=optimizer, **BF16)


def test_a_frozen_parameter_leaves_nothing_in_the_clients_optimizer():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    model.bias.requires_grad_(False)
    engine = start(model, optimizer=optimizer, **BF16)
    assert optimizer.param_groups[0]["param_names"] == ["weight"]
    assert len(engine.optimizer.state_dict()["base_optimizer_state"]["state"]) == 1
    step(engine)


def test_weights_without_masters_are_told(caplog):
    with caplog.at_level(logging.WARNING, logger="ds_core"):
        engine = start(nn.Linear(2, 1).to(torch.bfloat16))
        [record] = caplog.records
        assert "2 parameters, such as 'weight', are trained in torch.bfloat16 without fp32 masters" in record.message
        caplog.clear()
        engine.destroy()
        start(nn.Linear(2, 1), **BF16)
        assert caplog.records == []


def test_batch_statistics_that_torch_refuses_are_told(caplog):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with caplog.at_level(logging.WARNING, logger="ds_core"):
        engine = start(model, **BF16)
        [record] = caplog.records
        assert "the batch statistics of 1 modules, such as '1'" in record.message
    engine.destroy()
    caplog.clear()
    engine = start(model, **BF16, data_types={"buffer_dtype": "bf16"})
    assert caplog.records == []
    engine(torch.ones(2, 2, dtype=torch.bfloat16))


def test_after_loading_there_is_no_last_step(tmp_path):
    engine = start(nn.Linear(2, 1), fp16={"enabled": True, "loss_scale": 4})
    engine.save_checkpoint(tmp_path)
    step(engine, float("nan"))
    assert engine.overflows
    assert engine.optimizer.overflow
    engine.load_checkpoint(tmp_path)
    assert engine.overflows == ()
    assert engine.get_global_grad_norm() is None
    assert not engine.optimizer.overflow
    assert not engine.was_step_applied()


def test_what_is_in_force_is_not_called_without_effect():
    given = {"initial_scale_power": 4, "auto_cast": True}
    engine = start(nn.Linear(2, 1), precision={"type": "fp16"}, fp16=given)
    assert engine.fp16_enabled()
    assert engine.cur_scale == 16
    assert not [key for key in engine.report() if key.startswith("fp16")]
    engine.destroy()
    engine = start(
        nn.Linear(2, 1), **BF16, torch_autocast={"enabled": True, "lower_precision_safe_modules": ["torch.nn.Linear"]}
    )
    assert "no effect" in engine.report()["torch_autocast.lower_precision_safe_modules"]
