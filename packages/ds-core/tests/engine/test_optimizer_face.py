"""The face reads and writes an engine's parts: every name of it, over a precision that ds-core has itself."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch

import ds_core
from ds_core.engine.optimizer_face import DeepSpeedOptimizer, OptimizerFace, OverriddenScale
from ds_core.errors import CheckpointError, ConfigError, EngineError, LossScaleError, NotBuiltError
from ds_core.interfaces.precision import LossScaler
from ds_core.precision.fp32 import NoScaling
from ds_core.schedules import build_schedule
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.5,
    "log_level": "error",
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
}


class Doubling(LossScaler):
    """Doubles at each good step; has DeepSpeed's attributes."""

    dynamic = True

    def __init__(self) -> None:
        self.cur_scale = 4.0

    @property
    def scale(self) -> float:
        return self.cur_scale

    def update(self, *, overflowed: bool) -> None:
        self.cur_scale *= 0.5 if overflowed else 2.0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.cur_scale}

    def load_state_dict(self, state) -> None:
        if state["scale"] <= 0:
            raise CheckpointError("no scale is negative")
        self.cur_scale = state["scale"]


class GivingUp(Doubling):
    """At its minimum from the beginning."""

    error: Exception = LossScaleError("it cannot fall any further")

    def update(self, *, overflowed: bool) -> None:
        if overflowed:
            raise self.error
        super().update(overflowed=overflowed)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def start(scaler: LossScaler | None = None, skips: bool = False, **changes: Any):
    config = {**CONFIG, **changes.pop("config", {})}
    engine = ds_core.initialize(model=model(), config=config, **changes)[0]
    if scaler is not None:
        engine.parts.precision.scaler = scaler
    if skips:
        engine.parts.precision.overflowed = lambda norm: not math.isfinite(norm)
    return engine, OptimizerFace(engine)


def loss_of(module, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return module(torch.randn(2, 3, generator=generator)).square().mean()


def weights(engine) -> list[torch.Tensor]:
    return [param.detach().clone() for param in engine.module.parameters()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_it_is_deepspeeds_class_and_no_torch_optimizer():
    _, face = start()
    assert isinstance(face, ds_core.DeepSpeedOptimizer)
    assert ds_core.DeepSpeedOptimizer is DeepSpeedOptimizer
    assert not isinstance(face, torch.optim.Optimizer)


def test_names_that_clients_read():
    own = {name for name in vars(OptimizerFace) if not name.startswith("__")}
    assert own >= {
        *("optimizer", "param_groups", "state", "loss_scale", "cur_scale", "dynamic_loss_scale", "loss_scaler"),
        *("overflow", "clip_grad", "_global_grad_norm", "custom_loss_scaler", "external_loss_scale"),
        *("override_loss_scale", "zero_grad", "backward", "step", "set_lr", "get_lr", "refresh_fp32_params"),
        *("initialize_optimizer_states", "unscale_and_clip_grads", "needs_scaler", "scale_if_loss", "destroy"),
        *("is_gradient_accumulation_boundary", "set_gradient_accumulation_boundary", "state_dict", "load_state_dict"),
    }


def test_over_makes_any_subclass_a_face_of_an_engine():
    class OfAnOptimizer(OptimizerFace):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            raise AssertionError("it takes an optimizer")

    engine, face = start()
    over = OfAnOptimizer.over(engine)
    assert type(over) is OfAnOptimizer
    assert over.optimizer is face.optimizer is engine.basic_optimizer


def test_groups_and_state_are_the_torch_optimizers():
    engine, face = start()
    assert face.param_groups is engine.basic_optimizer.param_groups
    assert face.state is engine.basic_optimizer.state
    groups = [dict(group) for group in face.param_groups]
    face.param_groups = groups
    state = {**face.state}
    face.state = state
    assert engine.basic_optimizer.param_groups is groups
    assert engine.basic_optimizer.state is state


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_learning_rate_of_all_groups(tensor_lr):
    _, face = start()
    if tensor_lr:
        held = face.param_groups[0]["lr"] = torch.tensor(0.01)
    face.set_lr(0.25)
    assert face.get_lr() == 0.25
    if tensor_lr:
        assert face.param_groups[0]["lr"] is held


def test_a_loop_on_the_face_is_one_on_the_engine():
    engine, face = start()
    other, _ = start()
    for seed in range(4):
        face.zero_grad()
        assert face.backward(loss_of(engine, seed)) is None
        assert face.step() is False
        other.backward(loss_of(other, seed))
        other.step()
    assert same(weights(engine), weights(other))
    assert engine.global_steps == 4
    assert face._global_grad_norm == other.get_global_grad_norm() > 0


def test_zero_grad_forgets_gradients():
    engine, face = start()
    face.backward(loss_of(engine))
    face.zero_grad()
    assert all(param.grad is None for param in engine.module.parameters())
    with pytest.raises(EngineError, match="let go, not set to zero"):
        face.zero_grad(set_to_none=False)


def test_what_the_engine_does_not_do_is_refused():
    engine, face = start()
    before = weights(engine)
    with pytest.raises(EngineError, match=r"(?s)takes no closure.*backward\(loss\)"):
        face.step(lambda: None)
    with pytest.raises(NotBuiltError, match="create_graph"):
        face.backward(loss_of(engine), create_graph=True)
    with pytest.raises(EngineError, match="made by the first step"):
        face.initialize_optimizer_states()
    groups = len(face.param_groups)
    with pytest.raises(ConfigError, match="parameters that are not the model's"):
        face.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    assert len(face.param_groups) == groups
    assert same(weights(engine), before)
    assert not face.state
    assert engine.global_steps == 0


def test_retain_graph():
    engine, face = start()
    loss = loss_of(engine)
    face.backward(loss, retain_graph=True)
    once = [param.grad.clone() for param in engine.module.parameters()]
    face.backward(loss)
    assert same([param.grad for param in engine.module.parameters()], [2 * gradient for gradient in once])


def test_boundaries_are_the_engines():
    engine, face = start(config={"gradient_accumulation_steps": 2})
    assert not face.is_gradient_accumulation_boundary()
    face.set_gradient_accumulation_boundary(True)
    assert engine.is_gradient_accumulation_boundary()
    face.set_gradient_accumulation_boundary(None)
    assert not engine.is_gradient_accumulation_boundary()


# -- clipping ---------------------------------------------------------------------------------------------------------


def test_clip_grad_acts_from_the_next_step_on():
    clipped, face = start()
    free, _ = start(config={"gradient_clipping": 0.001})
    assert face.clip_grad == 0.5
    face.clip_grad = 0.001
    assert face.clip_grad == clipped.gradient_clipping() == 0.001
    assert "0.001" in clipped.report()["clipping"]
    for engine in (clipped, free):
        engine.backward(loss_of(engine))
        engine.step()
    assert same(weights(clipped), weights(free))
    unlike, _ = start()
    unlike.backward(loss_of(unlike))
    unlike.step()
    slots = [engine.basic_optimizer.state[next(engine.module.parameters())]["exp_avg"] for engine in (clipped, unlike)]
    assert not torch.equal(*slots)


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None, True])
def test_clip_grad_is_a_number(value):
    _, face = start()
    with pytest.raises(ConfigError, match="clip_grad is"):
        face.clip_grad = value
    assert face.clip_grad == 0.5


def test_unscale_and_clip_gradients_of_ones_own():
    _, face = start(Doubling(), config={"gradient_clipping": 3.0})
    grads = [torch.full((4,), 8.0), torch.full((3, 4), 8.0)]
    norm = math.sqrt(16 * 64.0)  # 32, so 8 without the scale of 4
    divisor = face.unscale_and_clip_grads(grads, norm, apply_scale=False)
    assert divisor == pytest.approx(4 * (8 + 1e-6) / 3)
    assert torch.equal(grads[0], torch.full((4,), 8.0))
    assert face.unscale_and_clip_grads(grads, norm) == divisor
    assert torch.cat([grad.flatten() for grad in grads]).norm().item() == pytest.approx(3.0, rel=1e-6)
    small = torch.full((4,), 0.5)
    assert face.unscale_and_clip_grads(small, 1.0) == 4.0
    assert torch.equal(small, torch.full((4,), 0.125))


# -- loss scale -------------------------------------------------------------------------------------------------------


def test_without_a_scaler_there_is_nothing_to_set():
    engine, face = start()
    assert (face.loss_scale, face.cur_scale, face.dynamic_loss_scale, face.needs_scaler()) == (1.0, 1.0, False, False)
    assert isinstance(face.loss_scaler, NoScaling)
    assert (face.custom_loss_scaler, face.external_loss_scale) == (False, None)
    loss = loss_of(engine)
    assert face.scale_if_loss(loss) is loss
    with pytest.raises(EngineError, match="NoScaling has no scale to set"):
        face.loss_scale = 2.0


def test_the_scale_is_read_and_set():
    engine, face = start(Doubling())
    assert (face.loss_scale, face.cur_scale, face.dynamic_loss_scale, face.needs_scaler()) == (4.0, 4.0, True, True)
    face.loss_scale = 32
    assert engine.cur_scale == face.loss_scaler.scale == 32.0
    face.cur_scale = 16.0
    assert engine.cur_scale == face.loss_scale == 16.0


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, 1e39, "2", None, True])
def test_a_scale_is_a_positive_number(value):
    _, face = start(Doubling())
    for assign in (lambda: setattr(face, "loss_scale", value), lambda: face.override_loss_scale(value)):
        with pytest.raises(ConfigError, match="the loss scale is"):
            assign()
    assert face.loss_scale == 4.0
    assert not face.custom_loss_scaler


def test_only_a_loss_is_scaled():
    engine, face = start(Doubling())
    loss = loss_of(engine)
    assert face.scale_if_loss(loss).item() == 4 * loss.item()
    for value in (loss.detach(), torch.ones(2, requires_grad=True) * 2, "text", None):
        assert face.scale_if_loss(value) is value


def test_an_overridden_scale_is_in_force_and_the_scaler_goes_on():
    engine, face = start(Doubling())
    plain, _ = start()
    face.override_loss_scale(1024.0)
    assert (face.custom_loss_scaler, face.external_loss_scale, face.loss_scale) == (True, 1024.0, 1024.0)
    for seed in range(3):
        face.backward(loss_of(engine, seed))
        plain.backward(loss_of(plain, seed))
        for scaled, gradient in zip(engine.module.parameters(), plain.module.parameters(), strict=True):
            assert torch.equal(scaled.grad, 1024.0 * gradient.grad)
        face.step()
        plain.step()
        assert face._global_grad_norm == plain.get_global_grad_norm()
    # A power of two rounds nothing, but the fused update divides where the plain one has a factor of 1.
    for scaled, weight in zip(weights(engine), weights(plain), strict=True):
        torch.testing.assert_close(scaled, weight, rtol=1e-6, atol=1e-7)
    assert engine.cur_scale == 1024.0
    assert face.loss_scaler.scale == 4.0 * 2**3
    with pytest.raises(EngineError, match="overridden"):
        face.loss_scale = 2.0
    face.override_loss_scale(8.0)
    assert engine.cur_scale == 8.0
    assert isinstance(face.loss_scaler, Doubling)


def test_only_the_scaler_of_an_overridden_scale_is_saved():
    scaler = Doubling()
    over = OverriddenScale(scaler, 3.0)
    assert isinstance(over, LossScaler)
    over.update(overflowed=True)
    assert over.state_dict() == {"scale": 2.0}
    over.load_state_dict({"scale": 64.0})
    assert (scaler.scale, over.scale) == (64.0, 3.0)


def test_a_scaler_that_gives_up_does_not_end_training_at_another_scale():
    engine, face = start(GivingUp(), skips=True)
    face.override_loss_scale(8.0)
    face.backward(loss_of(engine) * math.inf)
    assert face.step() is True
    assert (face.loss_scale, face.loss_scaler.scale) == (8.0, 4.0)
    face.backward(loss_of(engine))
    assert face.step() is False
    assert (face.loss_scale, face.loss_scaler.scale) == (8.0, 8.0), "it goes on learning"
    face.loss_scaler.error = EngineError("something else")
    face.backward(loss_of(engine) * math.inf)
    with pytest.raises(EngineError, match="something else"):
        face.step()


def test_a_scaler_in_force_that_gives_up_ends_training():
    engine, face = start(GivingUp(), skips=True)
    face.backward(loss_of(engine) * math.inf)
    with pytest.raises(LossScaleError, match="cannot fall any further"):
        face.step()


def test_an_engine_of_another_is_not_overridden():
    _, face = start()
    face.override_loss_scale(2.0)
    assert start()[1].loss_scale == 1.0


def test_the_scale_stays_within_a_window():
    engine, face = start(Doubling(), config={"gradient_accumulation_steps": 2})
    for close in (lambda: None, engine.step):
        face.backward(loss_of(engine))
        close()
        with pytest.raises(EngineError, match=r"(?s)inside an accumulation window.*micro-batch"):
            face.override_loss_scale(2.0)
        with pytest.raises(EngineError, match="inside an accumulation window"):
            face.loss_scale = 2.0
        with pytest.raises(EngineError, match="inside an accumulation window"):
            face.load_state_dict(face.state_dict())
    face.backward(loss_of(engine))
    face.step()
    face.override_loss_scale(2.0)
    assert face.loss_scale == 2.0


def test_a_precision_that_keeps_its_scaler_says_so():
    class Fixed(type(start()[0].parts.precision)):
        scaler = property(lambda self: NoScaling())

    engine, face = start()
    engine.parts.precision.__class__ = Fixed
    with pytest.raises(EngineError, match="Fixed keeps its loss scaler"):
        face.override_loss_scale(2.0)


def test_overflow_is_that_of_the_last_step():
    engine, face = start(Doubling(), skips=True)
    before = weights(engine)
    assert face.overflow is False
    face.backward(loss_of(engine) * math.inf)
    assert face.step() is True
    assert face.overflow is True
    assert same(weights(engine), before)
    assert face.loss_scale == 2.0
    face.backward(loss_of(engine))
    assert face.step() is False
    assert face.overflow is False


# -- schedules --------------------------------------------------------------------------------------------------------


def test_a_schedule_of_ours_takes_the_face_and_torchs_the_optimizer():
    engine, face = start()
    build_schedule("WarmupLR", {"warmup_min_lr": 0.125, "warmup_max_lr": 1.0, "warmup_num_steps": 4}, face)  # type: ignore[arg-type]
    assert face.get_lr() == 0.125
    schedule = torch.optim.lr_scheduler.StepLR(engine.basic_optimizer, step_size=1, gamma=0.5)
    for lr in (0.125, 0.0625, 0.03125):
        assert face.get_lr() == lr
        face.backward(loss_of(engine))
        face.step()
        schedule.step()


# -- state ------------------------------------------------------------------------------------------------------------


def train(face, steps: int, seed: int = 0) -> None:
    for step in range(steps):
        face.backward(loss_of(face._engine, seed + step))
        face.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_goes_on_bit_for_bit():
    engine, face = start(Doubling())
    train(face, 3)
    state = through_a_file(face.state_dict())
    other, resumed = start(Doubling())
    resumed.load_state_dict(state)
    assert same(weights(other), weights(engine))
    assert resumed.loss_scale == face.loss_scale == 32.0
    train(face, 3, seed=7)
    train(resumed, 3, seed=7)
    assert same(weights(other), weights(engine))
    assert resumed._global_grad_norm == face._global_grad_norm


def test_without_optimizer_states_it_starts_anew():
    engine, face = start()
    train(face, 3)
    other, resumed = start()
    resumed.load_state_dict(copy.deepcopy(face.state_dict()), load_optimizer_states=False)
    assert same(weights(other), weights(engine))
    assert not resumed.state


def test_state_of_other_parameters_changes_nothing():
    engine, face = start()
    train(face, 1)
    before, state = weights(engine), copy.deepcopy(face.state_dict())
    state["parameters"][0][0] = torch.zeros(7)
    state["optimizer_state_dict"]["param_groups"][0]["lr"] = 5.0
    with pytest.raises(CheckpointError, match=r"the state is of tensors \[\[\[7\]"):
        face.load_state_dict(state)
    assert same(weights(engine), before)
    assert face.get_lr() == 0.01
    del state["parameters"]
    with pytest.raises(CheckpointError, match=r"no 'parameters', it has optimizer_state_dict, loss_scaler"):
        face.load_state_dict(state)


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ({"loss_scaler": {"scale": -1.0}}, "no scale is negative"),
        ({"optimizer_state_dict": {"state": {}}}, "the state has no 'param_groups'"),
        (
            {"optimizer_state_dict": {"state": {}, "param_groups": [{"params": [0]}]}},
            r"groups of \[1\] parameters, the optimizer has \[4\]",
        ),
    ],
)
def test_state_with_a_bad_part_changes_nothing(broken, complaint):
    engine, face = start(Doubling())
    train(face, 1)
    saved = copy.deepcopy(face.state_dict())
    train(face, 2, seed=5)
    before, moments = weights(engine), str(face.optimizer.state_dict())
    with pytest.raises(CheckpointError, match=complaint):
        face.load_state_dict({**saved, **broken})
    assert same(weights(engine), before)
    assert same(face._updated()[0], before)
    assert str(face.optimizer.state_dict()) == moments
    assert face.loss_scale == 32.0
    face.load_state_dict(saved)
    assert not same(weights(engine), before)
    assert face.loss_scale == 8.0


def test_refresh_begins_anew_from_the_model():
    engine, face = start()
    with torch.no_grad():
        engine.module[0].weight.fill_(1.0)
    face.refresh_fp32_params()
    assert (face.param_groups[0]["params"][0] == 1.0).all()


def test_a_destroyed_face_says_so():
    engine, face = start()
    face.destroy()
    face.destroy()
    assert engine.is_destroyed
    with pytest.raises(EngineError, match="this engine was destroyed"):
        face.step()
