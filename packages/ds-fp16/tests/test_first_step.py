"""Before the first real step nothing has moved: no optimizer state, no weight decay, masters bit-equal to what came."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from ds_core import comm
from ds_core.interfaces.logical import MASTER
from ds_core.testing import reference
from ds_core.testing.low_precision import PRECISIONS
from ds_core.testing.reference import Case, build_model, logical_values, loss_of, micro_batch

OPTIONS = {"lr": 0.5, "weight_decay": 0.9}
"""A step, even one without gradients, would shrink every weight to about half."""
SCHEDULE = {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_type": "linear", "warmup_max_lr": 0.5}}


@pytest.fixture(autouse=True)
def leave_no_group():
    yield
    comm.destroy_process_group()


def start(case: Case, **config: Any) -> Any:
    adamw = {"type": "AdamW", "params": OPTIONS}
    return reference.start(case, {"optimizer": adamw, **config})


def updated(engine: Any) -> dict[str, torch.Tensor]:
    """Return what the optimizer updates, by name."""
    weights = {name: p.detach().clone() for name, p in engine.module.named_parameters() if p.requires_grad}
    return {**weights, **logical_values(engine, MASTER)}


@pytest.mark.parametrize("model", ["all", "mixed"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_initialize_moves_nothing(precision, model):
    case = Case(model, precision=precision)
    given = {name: param.detach() for name, param in build_model(case).named_parameters()}
    engine = start(case, scheduler=SCHEDULE)
    assert engine.basic_optimizer.state == {}
    assert engine.global_steps == engine.skipped_steps == 0
    for name, value in updated(engine).items():
        if precision.startswith("autocast"):
            assert value.dtype == given[name].dtype
            assert torch.equal(value, given[name]), name
        else:
            assert value.dtype == torch.float32
            # Where it came in fp32 these are its bits; where it came in 16, all of them are kept.
            assert torch.equal(value, given[name].float()), name
    stored = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    for name, param in engine.module.named_parameters():
        assert torch.equal(param, given[name].to(stored or given[name].dtype)), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_buffers_and_frozen_parameters(precision):
    engine = start(Case("all", precision=precision))
    assert engine.module.scale.dtype == torch.float32, "buffers are left as they were"
    assert not any(name.startswith("frozen") for name in logical_values(engine, MASTER))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_forward_and_backward_move_nothing(precision):
    engine = start(Case("all", accumulation=2, precision=precision))
    before = updated(engine)
    for _ in range(2):
        engine.backward(loss_of(engine(*micro_batch(0, 0, 0))))
        assert engine.basic_optimizer.state == {}
        assert all(torch.equal(value, before[name]) for name, value in updated(engine).items())
        if not engine.is_gradient_accumulation_boundary():
            engine.step()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_first_step_is_adams_first(precision):
    """Its bias correction has the number 1, and weight decay acts once."""
    engine = start(Case("plain", precision=precision))
    params = {name: torch.nn.Parameter(value) for name, value in updated(engine).items()}
    engine.backward(loss_of(engine(*micro_batch(0, 0, 0))))
    for name, param in engine.module.named_parameters():
        params[name].grad = param.grad.float() / engine.cur_scale
    engine.step()
    plain = torch.optim.AdamW(params.values(), **OPTIONS)
    plain.step()
    assert engine.was_step_applied()
    for name, value in updated(engine).items():
        torch.testing.assert_close(value, params[name].detach(), rtol=2**-20, atol=2**-20)
    assert {float(state["step"]) for state in engine.basic_optimizer.state.values()} == {1.0}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_first_step_that_is_skipped_leaves_everything(precision):
    engine = start(Case("all", precision=precision), scheduler=SCHEDULE)
    before, lr, schedule = updated(engine), engine.get_lr(), copy.deepcopy(engine.lr_scheduler.state_dict())
    engine.backward(loss_of(engine(*micro_batch(0, 0, 0))) * float("inf"))
    engine.step()
    assert not engine.was_step_applied()
    assert engine.basic_optimizer.state == {}
    assert all(torch.equal(value, before[name]) for name, value in updated(engine).items())
    assert engine.get_lr() == lr
    assert engine.lr_scheduler.state_dict() == schedule
    # What was skipped is not the first step: the one after it is.
    engine.backward(loss_of(engine(*micro_batch(0, 0, 0))))
    engine.step()
    assert engine.was_step_applied()
    assert {float(state["step"]) for state in engine.basic_optimizer.state.values()} == {1.0}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_parameters_without_a_gradient_stay_as_they_came(precision):
    engine = start(Case("unused", precision=precision))
    before = updated(engine)
    engine.backward(loss_of(engine(*micro_batch(0, 0, 0))))
    engine.step()
    after = updated(engine)
    assert engine.was_step_applied()
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith("never"), name
