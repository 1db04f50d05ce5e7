"""The optimizers by name, as an engine has them and made by hand, against loops in plain PyTorch."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch

import ds_core
from ds_core.errors import CheckpointError, ConfigError, EngineError, NotBuiltError
from ds_core.schedules import build_schedule
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.ranks import run_ranks
from ds_fp16 import BF16_Optimizer, FP16_Optimizer, FP16_UnfusedOptimizer, LossScaleConfig, loss_scaler

FP16 = {"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 2}}
BF16 = {"bf16": {"enabled": True}}
ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 0.0625, "weight_decay": 0.5}}}
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.0625, "momentum": 0.5}}}
KINDS = {
    "fp16 Adam": (FP16 | ADAM, FP16_Optimizer),
    "fp16 SGD": (FP16 | SGD, FP16_UnfusedOptimizer),
    "bf16 Adam": (BF16 | ADAM, BF16_Optimizer),
    "bf16 SGD": (BF16 | SGD, BF16_Optimizer),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def loss_of(module: torch.nn.Module, seed: int) -> torch.Tensor:
    """Return a loss in fp32; where ``seed`` is negative its gradient is inf."""
    generator = torch.Generator().manual_seed(abs(seed))
    out = module(torch.randn(5, 3, generator=generator).to(next(module.parameters()).dtype))
    return out.float().square().mean() * (math.inf if seed < 0 else 1.0)


def start(kind: str = "fp16 Adam", **config: Any):
    base = {"train_micro_batch_size_per_gpu": 5, "gradient_clipping": 0.0, "log_level": "error"}
    engine, face, _, _ = ds_core.initialize(model=model(), config={**base, **KINDS[kind][0], **config})
    return engine, face


def train(face: Any, module: torch.nn.Module, seeds) -> list[bool]:
    skipped = []
    for seed in seeds:
        face.zero_grad()
        face.backward(loss_of(module, seed))
        skipped.append(face.step())
    return skipped


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def masters(face: Any) -> torch.Tensor:
    return flat(tensor for group in face.param_groups for tensor in group["params"])


# -- of an engine -----------------------------------------------------------------------------------------------------


@every_kind
def test_the_engines_optimizer_is_deepspeeds_class(kind):
    engine, face = start(kind)
    assert type(face) is KINDS[kind][1]
    assert engine.optimizer is face
    assert isinstance(face, ds_core.DeepSpeedOptimizer)
    assert face.optimizer is engine.basic_optimizer
    assert isinstance(face.optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (torch.optim.Adam, FP16_Optimizer),
        (torch.optim.AdamW, FP16_Optimizer),
        (type("FusedAdam", (torch.optim.SGD,), {}), FP16_Optimizer),
        (torch.optim.NAdam, FP16_UnfusedOptimizer),
        (torch.optim.Adagrad, FP16_UnfusedOptimizer),
    ],
)
def test_an_adam_is_fused(cls, expected):
    module = model()
    config = {"train_micro_batch_size_per_gpu": 5, "gradient_clipping": 0.0, **FP16}
    _, face, _, _ = ds_core.initialize(model=module, optimizer=cls(module.parameters(), lr=0.1), config=config)
    assert type(face) is expected


@pytest.mark.parametrize("section", [FP16, BF16])
def test_an_engine_without_optimizer_has_none(section):
    engine, face, _, _ = ds_core.initialize(model=model(), config={"train_micro_batch_size_per_gpu": 5, **section})
    assert face is None
    assert engine.optimizer is None


@every_kind
def test_nothing_moves_before_the_first_step(kind):
    given = flat(model().parameters())
    engine, face = start(kind)
    assert torch.equal(masters(face), given)
    assert torch.equal(flat(engine.module.parameters()), given.to(face.low_precision_dtype))
    assert not face.state
    assert not face.has_executed_step
    assert face.overflow is False
    with pytest.raises(EngineError, match="made by the first step"):
        face.initialize_optimizer_states()
    assert torch.equal(masters(face), given)


@every_kind
def test_names_that_scripts_read(kind):
    _, face = start(kind, gradient_clipping=0.5)
    low, cls = ("fp16", torch.float16) if "fp16" in kind else ("bf16", torch.bfloat16)
    assert face.low_precision_dtype == cls
    assert (face.norm_type, face.mpu, face.timers, face.clip_grad) == (2, None, None, 0.5)
    assert face._global_grad_norm is None
    params = getattr(face, f"{low}_groups")
    assert [[param.dtype for param in group] for group in params] == [[cls] * 4]
    assert [[tensor.dtype for tensor in group] for group in face.fp32_groups] == [[torch.float32] * 4]
    assert face.fp32_groups[0][0] is face.param_groups[0]["params"][0]
    assert [tuple(tensor.shape) for tensor in face.fp32_groups[0]] == [tuple(param.shape) for param in params[0]]


def test_flat_attributes_are_copies():
    engine, face = start()
    assert torch.equal(face.fp16_groups_flat[0], flat(engine.module.parameters()))
    assert torch.equal(face.fp32_groups_flat[0], masters(face))
    face.fp16_groups_flat[0].zero_()
    face.fp32_groups_flat[0].zero_()
    assert masters(face).count_nonzero()
    assert flat(engine.module.parameters()).count_nonzero()


def test_loss_scale_config_is_a_view():
    engine, face = start()
    config = face.loss_scale_config
    assert (config.dynamic_loss_scale, config.cur_scale, config.cur_iter, config.scale_window) == (True, 1024.0, 0, 2)
    assert train(face, engine.module, [1, 2, 3]) == [False] * 3
    assert (config.cur_scale, config.cur_iter) == (2048.0, 3)
    assert face.loss_scale == engine.cur_scale == 2048.0
    assert face.has_executed_step
    face.loss_scale = 256.0
    assert engine.cur_scale == config.cur_scale == 256.0


def test_the_overflow_checker_sees_what_step_sees():
    engine, face = start()
    for seed in (1, -2):
        face.backward(loss_of(engine.module, seed))
        found = face.overflow_checker.check()
        assert face.step() == bool(found) == (seed < 0)


@every_kind
def test_an_overflow_is_skipped_and_told(kind):
    engine, face = start(kind)
    train(face, engine.module, [1])
    before, state = masters(face), copy.deepcopy(face.optimizer.state_dict())
    assert train(face, engine.module, [-1]) == [True]
    assert face.overflow is True
    assert torch.equal(masters(face), before)
    assert str(face.optimizer.state_dict()) == str(state)
    assert train(face, engine.module, [2]) == [False]
    assert face.overflow is False
    assert not torch.equal(masters(face), before)


def test_an_overridden_scale_unscales_too():
    engine, face = start()
    other, plain = start()
    face.override_loss_scale(64.0)
    assert (face.loss_scale, face.custom_loss_scaler, face.external_loss_scale) == (64.0, True, 64.0)
    train(face, engine.module, [1, 2, 3])
    train(plain, other.module, [1, 2, 3])
    assert face.loss_scaler.loss_scale == face.loss_scale_config.cur_scale == 2048.0  # went on learning
    assert face.loss_scale == 64.0
    # The gradients differ by what fp16 rounds at one scale and not at the other: half a unit, 2**-11 of each, for the
    # few operations of this model. Adam moves by about lr at each step, whatever they are.
    torch.testing.assert_close(masters(face), masters(plain), rtol=0, atol=0.0625 * 3 * 2**-6)
    assert face._global_grad_norm == pytest.approx(plain._global_grad_norm, rel=2**-6)


def test_bf16_is_not_scaled():
    _, face = start("bf16 Adam")
    assert (face.loss_scale, face.cur_scale, face.needs_scaler(), face.dynamic_loss_scale) == (1.0, 1.0, False, False)
    with pytest.raises(EngineError, match="not scaled in bf16"):
        face.loss_scale = 2.0
    with pytest.raises(EngineError, match="not scaled in bf16"):
        face.override_loss_scale(2.0)


@every_kind
def test_schedules_of_torch_and_ours(kind):
    engine, face = start(kind)
    build_schedule("WarmupLR", {"warmup_min_lr": 0.5, "warmup_max_lr": 1.0, "warmup_num_steps": 4}, face)
    assert face.get_lr() == 0.5
    schedule = torch.optim.lr_scheduler.StepLR(engine.basic_optimizer, step_size=1, gamma=0.5)
    rates = []
    for seed in range(3):
        rates.append(face.get_lr())
        train(face, engine.module, [seed])
        schedule.step()
    assert rates == [0.5, 0.25, 0.125]
    face.set_lr(3.0)
    assert engine.get_lr() == [3.0]


def test_writing_to_the_model_needs_a_refresh():
    engine, face = start()
    with torch.no_grad():
        engine.module[0].weight.fill_(0.5)
    face.refresh_fp32_params()
    assert (face.fp32_groups[0][0] == 0.5).all()


# -- state ------------------------------------------------------------------------------------------------------------

KEYS = {
    "fp16 Adam": {
        *("dynamic_loss_scale", "cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window"),
        *("optimizer_state_dict", "fp32_groups_flat", "clip_grad", "loss_scaler"),
    },
    "fp16 SGD": {
        *("dynamic_loss_scale", "cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window"),
        *("optimizer_state_dict", "fp32_groups", "loss_scaler"),
    },
    "bf16 Adam": {
        *("clip_grad", "base_optimizer_state", "single_partition_of_fp32_groups", "group_paddings"),
        *("partition_count", "ds_version", "param_slice_mappings"),
    },
}
KEYS["bf16 SGD"] = KEYS["bf16 Adam"]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_kind
def test_state_has_deepspeeds_keys(kind):
    _, face = start(kind)
    assert set(face.state_dict()) == KEYS[kind]


def test_a_static_scale_has_no_keys_of_a_dynamic_one():
    _, face = start("fp16 SGD", fp16={"enabled": True, "loss_scale": 128})
    state = face.state_dict()
    assert (state["dynamic_loss_scale"], state["cur_scale"], state["cur_iter"]) == (False, 128.0, 0)
    assert not {"last_overflow_iter", "scale_factor", "scale_window"} & set(state)


@every_kind
def test_state_goes_on_bit_for_bit(kind):
    seeds = [1, -2, 3, 4]  # the overflow takes one off the hysteresis, which DeepSpeed's keys do not hold
    engine, face = start(kind)
    train(face, engine.module, seeds)
    state = through_a_file(face.state_dict())
    other, resumed = start(kind)
    train(resumed, other.module, [9])
    resumed.load_state_dict(state)
    assert torch.equal(masters(resumed), masters(face))
    assert torch.equal(flat(other.module.parameters()), flat(engine.module.parameters()))
    assert resumed.loss_scaler.state_dict() == face.loss_scaler.state_dict()
    more = [5, -6, 7, 8, 9]
    assert train(resumed, other.module, more) == train(face, engine.module, more)
    assert torch.equal(masters(resumed), masters(face))
    assert torch.equal(flat(other.module.parameters()), flat(engine.module.parameters()))
    assert resumed.loss_scaler.state_dict() == face.loss_scaler.state_dict()
    assert resumed.loss_scale == face.loss_scale


@every_kind
def test_without_optimizer_states(kind):
    engine, face = start(kind)
    train(face, engine.module, [1, 2])
    other, resumed = start(kind)
    resumed.load_state_dict(through_a_file(face.state_dict()), load_optimizer_states=False)
    assert torch.equal(masters(resumed), masters(face))
    assert torch.equal(flat(other.module.parameters()), flat(engine.module.parameters()))
    assert not resumed.state


@pytest.mark.parametrize("kind", ["fp16 Adam", "fp16 SGD"])
def test_deepspeeds_own_state_is_read(kind):
    engine, face = start(kind)
    train(face, engine.module, [1, -2, -3, 4])
    state = face.state_dict()
    del state["loss_scaler"]
    _, resumed = start(kind)
    resumed.load_state_dict(state)
    names = ("cur_scale", "cur_iter", "last_overflow_iter")
    assert [getattr(resumed.loss_scaler, name) for name in names] == [512.0, 4, 2]


@pytest.mark.parametrize("kind", ["fp16 Adam", "bf16 Adam"])
def test_settings_are_not_loaded(kind):
    _, face = start(kind, gradient_clipping=0.25)
    _, resumed = start(kind, gradient_clipping=2.0)
    resumed.load_state_dict(face.state_dict())
    assert resumed.clip_grad == 2.0


@every_kind
def test_state_that_does_not_fit_changes_nothing(kind):
    engine, face = start(kind)
    train(face, engine.module, [1])
    key = next(key for key in face.state_dict() if "fp32_groups" in key)
    before = masters(face)
    wrong = copy.deepcopy(face.state_dict())
    wrong[key][0] = [torch.zeros(3)] if key == "fp32_groups" else torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"the state (has|is of)"):
        face.load_state_dict(wrong)
    del wrong[key]
    with pytest.raises(CheckpointError, match=f"the state has no '{key}'"):
        face.load_state_dict(wrong)
    assert torch.equal(masters(face), before)


def test_bf16_state_of_many_ranks_is_refused():
    _, face = start("bf16 Adam")
    state = face.state_dict()
    with pytest.raises(CheckpointError, match="one of 4 partitions"):
        face.load_state_dict({**state, "partition_count": [4]})
    del state["ds_version"]
    with pytest.raises(CheckpointError, match="no 'ds_version'"):
        face.load_state_dict(state)


# -- BF16_Optimizer ---------------------------------------------------------------------------------------------------


def test_bf16_partitions_are_whole():
    engine, face = start("bf16 Adam")
    whole = flat(engine.module.parameters())
    assert (face.partition_count, face.group_paddings) == ([1], [0])
    assert torch.equal(face.bf16_groups_flat[0], whole)
    assert torch.equal(face.bf16_partitioned_groups[0][0], whole)
    for name in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups"):
        assert torch.equal(getattr(face, name)[0], masters(face))
    assert face.state_dict()["param_slice_mappings"] == [
        {
            "0.weight": {"start": 0, "numel": 12},
            "0.bias": {"start": 12, "numel": 4},
            "2.weight": {"start": 16, "numel": 8},
            "2.bias": {"start": 24, "numel": 2},
        }
    ]


@pytest.mark.parametrize("accumulate", ["fp32", "bf16"])
def test_bf16_gradients_are_those_that_accumulate(accumulate):
    engine, face = start("bf16 Adam", data_types={"grad_accum_dtype": accumulate}, gradient_accumulation_steps=2)
    dtype = torch.float32 if accumulate == "fp32" else torch.bfloat16
    assert face.fp32_groups_has_gradients == [[False] * 4]
    assert [gradient.dtype for gradient in face.fp32_groups_gradients[0]] == [dtype] * 4
    assert not face.fp32_groups_gradients_flat[0].count_nonzero()
    face.backward(loss_of(engine.module, 1))
    assert face.fp32_groups_has_gradients == [[True] * 4]
    assert face.fp32_groups_gradients[0][0] is engine.module[0].weight.grad
    whole = face.fp32_groups_gradient_flat_partition[0]
    assert whole.dtype == dtype
    assert torch.equal(whole, flat(param.grad for param in engine.module.parameters()))
    face.clear_hp_grads()
    assert face.fp32_groups_has_gradients == [[False] * 4]


def test_bf16_prologue_and_epilogue_are_a_backward():
    by_hand, face = start("bf16 Adam")
    other, plain = start("bf16 Adam")
    for seed in (1, 2):
        face.backward_prologue()
        loss_of(by_hand.module, seed).backward()
        face.backward_epilogue()
        face.step()
    train(plain, other.module, [1, 2])
    assert torch.equal(masters(face), masters(plain))
    assert face._global_grad_norm == plain._global_grad_norm


def test_bf16_prologue_is_refused_where_the_loss_is_divided():
    _, face = start("bf16 Adam", gradient_accumulation_steps=4)
    with pytest.raises(EngineError, match=r"(?s)multiplied by 0.25.*call backward\(loss\)"):
        face.backward_prologue()


@pytest.mark.parametrize(
    "call",
    [
        lambda face: face.backward_epilogue(update_hp_grads=False),
        lambda face: face.backward_epilogue(clear_lp_grads=True),
        lambda face: face.update_hp_grads(),
        lambda face: face.clear_lp_grads(),
    ],
)
def test_bf16_has_one_gradient_per_parameter(call):
    engine, face = start("bf16 Adam")
    face.backward(loss_of(engine.module, 1))
    with pytest.raises(EngineError, match=r"(?s)one gradient per parameter.*call backward\(loss\) and step\(\)"):
        call(face)
    assert face.step() is False


def test_bf16_masters_are_brought_to_the_model():
    engine, face = start("bf16 Adam")
    with torch.no_grad():
        face.fp32_groups[0][0].fill_(0.25)
    face.update_lp_params()
    assert (engine.module[0].weight == 0.25).all()


# -- made by hand -----------------------------------------------------------------------------------------------------


def groups_of(module: torch.nn.Module) -> list[dict[str, Any]]:
    """Return two groups that differ, one with a frozen parameter, and one that is frozen as a whole."""
    module[0].bias.requires_grad_(False)
    module[2].bias.requires_grad_(False)
    return [
        {"params": [module[0].weight, module[0].bias]},
        {"params": [module[2].bias]},
        {"params": [module[2].weight], "lr": 0.25, "weight_decay": 0.0},
    ]


def plain_loop(cls, options, dtype, scales, seeds, clip: float = 0.0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Train with masters in plain PyTorch, at a given scale per step; None: that step is skipped."""
    module = model()
    groups = groups_of(module)
    pairs: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    kept = []
    for group in groups:
        trained = [param for param in group["params"] if param.requires_grad]
        copies = [param.detach().clone().requires_grad_() for param in trained]
        pairs += zip(trained, copies, strict=True)
        if trained:
            kept.append({**group, "params": copies})
    module.to(dtype)
    optimizer = cls(kept, **options)
    for scale, seed in zip(scales, seeds, strict=True):
        for param, _ in pairs:
            param.grad = None
        if scale is None:
            continue
        (loss_of(module, seed) * scale).backward()
        for param, master in pairs:
            master.grad = param.grad.float() / scale
        if clip:
            torch.nn.utils.clip_grad_norm_([master for _, master in pairs], clip)
        optimizer.step()
        with torch.no_grad():
            for param, master in pairs:
                param.copy_(master)
    return [master.detach() for _, master in pairs], [param.detach() for param in module.parameters()]


OPTIONS = {torch.optim.AdamW: {"lr": 0.0625, "weight_decay": 0.5}, torch.optim.SGD: {"lr": 0.0625, "momentum": 0.5}}
MADE = {
    "FP16": lambda optimizer, **k: FP16_Optimizer(optimizer, **k),
    "FP16 in bf16": lambda optimizer, **k: FP16_Optimizer(optimizer, low_precision_dtype=torch.bfloat16, **k),
    "unfused": lambda optimizer, **k: FP16_UnfusedOptimizer(optimizer, **k),
    "BF16": lambda optimizer, **k: BF16_Optimizer(optimizer, **k),
}


@pytest.mark.parametrize("cls", OPTIONS)
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("clip", [0.0, 0.0625])
def test_a_loop_of_ones_own_equals_plain_pytorch(made, cls, clip):
    dtype = torch.bfloat16 if "16" in made and made != "FP16" else torch.float16
    scaled = made in ("FP16", "unfused")
    module = model()
    options = {"static_loss_scale": 256.0} if scaled else {}
    face = MADE[made](cls(groups_of(module), **OPTIONS[cls]), clip_grad=clip, **options)
    assert {param.dtype for param in module.parameters()} == {dtype}
    seeds = [1, 2, -3, 4, 5]
    assert train(face, module, seeds) == [False, False, True, False, False]
    scales = [None if seed < 0 else 256.0 if scaled else 1.0 for seed in seeds]
    expected, weights = plain_loop(cls, OPTIONS[cls], dtype, scales, seeds, clip)
    assert [len(group["params"]) for group in face.param_groups] == [1, 1]
    assert [group["lr"] for group in face.param_groups] == [0.0625, 0.25]
    for ours, reference in zip((tensor for group in face.fp32_groups for tensor in group), expected, strict=True):
        # Without clipping every factor is a power of two and nothing rounds. With it, the norm is a sum in another
        # order, and the factor rounds once more: a few units of 2**-24 of the gradient, at four steps of at most lr.
        bound = {"rtol": 0, "atol": 0} if clip == 0.0 else {"rtol": 0, "atol": 0.25 * 4 * 2**-20}
        torch.testing.assert_close(ours.detach(), reference, **bound)
    if clip == 0.0:
        assert torch.equal(flat(module.parameters()), flat(weights))


def test_a_dynamic_scale_equals_plain_pytorch():
    module = model()
    optimizer = torch.optim.AdamW(groups_of(module), **OPTIONS[torch.optim.AdamW])
    arguments = {"init_scale": 2.0**8, "scale_window": 2, "min_scale": 1.0}
    face = FP16_Optimizer(optimizer, dynamic_loss_scale=True, dynamic_loss_args=arguments)
    seeds = [1, 2, 3, -4, 5, 6, 7]
    scales = []
    for seed in seeds:
        scales.append(None if seed < 0 else face.loss_scale)
        train(face, module, [seed])
    # No hysteresis: the overflow halves at once. It grows at step 2 of a window that begins after the overflow.
    assert scales == [256.0, 256.0, 256.0, None, 256.0, 256.0, 256.0]
    assert face.loss_scale == 512.0
    expected, weights = plain_loop(torch.optim.AdamW, OPTIONS[torch.optim.AdamW], torch.float16, scales, seeds)
    assert torch.equal(masters(face), flat(expected))
    assert torch.equal(flat(module.parameters()), flat(weights))


@pytest.mark.parametrize(
    ("cls", "first", "smallest"), [(FP16_Optimizer, 2.0**32, 1.0), (FP16_UnfusedOptimizer, 2.0**16, 0.25)]
)
def test_defaults_of_a_dynamic_scale_are_deepspeeds(cls, first, smallest):
    face = cls(torch.optim.AdamW(model().parameters()), dynamic_loss_scale=True)
    config = face.loss_scale_config
    assert (config.cur_scale, config.scale_window, config.min_loss_scale) == (first, 1000, smallest)


def test_a_first_scale_that_json_cannot_say():
    face = FP16_Optimizer(
        torch.optim.AdamW(model().parameters()), dynamic_loss_scale=True, initial_dynamic_scale=1000.0
    )
    assert face.loss_scale == 1000.0
    face = FP16_Optimizer(torch.optim.AdamW(model().parameters()), static_loss_scale=3.0)
    assert (face.loss_scale, face.dynamic_loss_scale, face.needs_scaler()) == (3.0, False, True)


def test_a_loss_scale_config_is_the_scaling():
    config = LossScaleConfig(torch.float16, True, 1.0, {"init_scale": 32.0, "scale_window": 1})
    module = model()
    face = FP16_UnfusedOptimizer(torch.optim.AdamW(module.parameters()), loss_scale_config=config)
    assert face.loss_scaler is config.scaler
    assert isinstance(face.loss_scaler, loss_scaler.DynamicLossScaler)
    train(face, module, [1, 2])
    assert config.cur_scale == 64.0


def test_the_state_of_the_optimizer_given_is_kept():
    module = model()
    optimizer = torch.optim.AdamW(module.parameters())
    loss_of(module, 1).backward()
    optimizer.step()
    moment = optimizer.state[module[0].weight]["exp_avg"]
    face = FP16_Optimizer(optimizer)
    assert face.optimizer is optimizer
    assert face.state[face.fp32_groups[0][0]]["exp_avg"] is moment


def test_bf16_uses_the_names_given():
    module = model()
    names = {param: f"body.{name}" for name, param in module.named_parameters()}
    face = BF16_Optimizer(torch.optim.AdamW(module.parameters()), names)
    assert list(face.state_dict()["param_slice_mappings"][0]) == list(names.values())
    del names[module[0].weight]
    with pytest.raises(ConfigError, match=r"param_names has no name for a parameter of shape \[4, 3\]"):
        BF16_Optimizer(torch.optim.AdamW(module.parameters()), names)


def test_bf16_without_a_check_applies_what_overflowed():
    module = model()
    face = BF16_Optimizer(torch.optim.SGD(module.parameters(), lr=0.1), bfloat16_config={"check_grad_overflow": False})
    assert train(face, module, [-1]) == [False]
    assert not masters(face).isfinite().all()


def test_bf16_accumulates_as_asked():
    module = model()
    face = BF16_Optimizer(torch.optim.SGD(module.parameters(), lr=0.1), grad_acc_dtype=torch.float32)
    face.backward(loss_of(module, 1))
    face.backward(loss_of(module, 2))
    assert face.fp32_groups_gradients_flat[0].dtype == torch.float32
    assert face.step() is False


BY_CLASS = {
    FP16_Optimizer: {
        "deepspeed": object(),
        "mpu": object(),
        "fused_adam_legacy": True,
        "has_moe_layers": True,
        "timers": object(),
    },
    FP16_UnfusedOptimizer: {"deepspeed": object(), "mpu": object(), "fused_lamb_legacy": True},
    BF16_Optimizer: {
        "mpu": object(),
        "norm_type": 1,
        "allgather_bucket_size": 1000,
        "dp_process_group": object(),
        "timers": object(),
        "graph_harvesting": True,
        "has_moe_layers": True,
    },
}


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, names in BY_CLASS.items() for name in names])
def test_an_argument_that_cannot_act_is_refused(cls, name):
    with pytest.raises(NotBuiltError, match=rf"(?s){name}= is not built.*{cls.__name__}\({name}\)"):
        cls(torch.optim.AdamW(model().parameters()), **{name: BY_CLASS[cls][name]})
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("cls", [FP16_Optimizer, FP16_UnfusedOptimizer])
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"dynamic_loss_args": {}}, "dynamic_loss_args= would change nothing: dynamic_loss_scale is False"),
        ({"dynamic_loss_scale": True, "static_loss_scale": 8.0}, "static_loss_scale= would change nothing"),
        ({"low_precision_dtype": torch.bfloat16, "dynamic_loss_scale": True}, "dynamic_loss_scale= .*only fp16 is"),
        ({"low_precision_dtype": torch.bfloat16, "static_loss_scale": 2.0}, "static_loss_scale= .*only fp16 is"),
        ({"low_precision_dtype": torch.float32}, "low_precision_dtype is torch.float32"),
        ({"static_loss_scale": 0.0}, "cur_scale is 0.0"),
        (
            {"loss_scale_config": LossScaleConfig(torch.float16, False, 2.0, None), "dynamic_loss_scale": True},
            "dynamic_loss_scale= and loss_scale_config=",
        ),
    ],
)
def test_arguments_that_contradict_each_other(cls, arguments, complaint):
    with pytest.raises(ConfigError, match=f"(?s){complaint}"):
        cls(torch.optim.AdamW(model().parameters()), **arguments)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "arguments",
    [
        {"initial_dynamic_scale": 8.0},
        {"initial_dynamic_scale": 8.0, "dynamic_loss_scale": True, "dynamic_loss_args": {"init_scale": 4.0}},
    ],
)
def test_a_first_scale_that_nobody_uses(arguments):
    with pytest.raises(ConfigError, match="initial_dynamic_scale= would change nothing"):
        FP16_Optimizer(torch.optim.AdamW(model().parameters()), **arguments)


@pytest.mark.parametrize("cls", BY_CLASS)
def test_it_takes_over_a_torch_optimizer_of_parameters(cls):
    with pytest.raises(ConfigError, match="init_optimizer is a Sequential"):
        cls(model())
    with pytest.raises(ConfigError, match="init_optimizer updates a Tensor"):
        cls(torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1))


def test_bf16_accumulates_in_two_dtypes():
    with pytest.raises(ConfigError, match=r"grad_acc_dtype is torch.float16"):
        BF16_Optimizer(torch.optim.AdamW(model().parameters()), grad_acc_dtype=torch.float16)


def test_in_bf16_the_fused_class_has_no_scale():
    face = FP16_Optimizer(torch.optim.AdamW(model().parameters()), low_precision_dtype=torch.bfloat16)
    assert face.loss_scale is None
    assert set(face.state_dict()) == {"optimizer_state_dict", "fp32_groups_flat", "clip_grad"}
    with pytest.raises(EngineError, match="not scaled in bf16"):
        face.override_loss_scale(2.0)
    other = FP16_UnfusedOptimizer(torch.optim.AdamW(model().parameters()), low_precision_dtype=torch.bfloat16)
    assert other.loss_scale == 1.0


@pytest.mark.parametrize("cls", [FP16_Optimizer, FP16_UnfusedOptimizer])
def test_in_bf16_the_scale_is_1_and_cannot_be_set(cls):
    face = cls(torch.optim.AdamW(model().parameters()), low_precision_dtype=torch.bfloat16)
    config = face.loss_scale_config
    assert (config.cur_scale, config.cur_iter, config.dynamic_loss_scale, config.use_grad_scaling) == (
        1.0,
        None,
        False,
        False,
    )
    for name in ("loss_scale", "cur_scale"):
        with pytest.raises(EngineError, match=rf"(?s)not scaled in bf16.*{cls.__name__}\.loss_scale"):
            setattr(face, name, 2.0)
    assert (face.cur_scale, face.needs_scaler()) == (1.0, False)


@pytest.mark.parametrize("cls", [FP16_Optimizer, FP16_UnfusedOptimizer])
def test_state_in_bf16_goes_on_bit_for_bit(cls):
    module, another = model(), model()
    face, resumed = (
        cls(torch.optim.AdamW(each.parameters(), lr=0.0625), low_precision_dtype=torch.bfloat16)
        for each in (module, another)
    )
    train(face, module, [1, -2, 3])
    resumed.load_state_dict(through_a_file(face.state_dict()))
    assert torch.equal(flat(another.parameters()), flat(module.parameters()))
    assert train(resumed, another, [4, -5]) == train(face, module, [4, -5]) == [False, True]
    assert torch.equal(masters(resumed), masters(face))


def test_unfused_state_in_bf16_has_the_keys_of_a_static_scale():
    face = FP16_UnfusedOptimizer(torch.optim.AdamW(model().parameters()), low_precision_dtype=torch.bfloat16)
    state = face.state_dict()
    assert set(state) == {
        *("dynamic_loss_scale", "cur_scale", "cur_iter", "loss_scaler", "optimizer_state_dict", "fp32_groups")
    }
    assert (state["dynamic_loss_scale"], state["cur_scale"], state["loss_scaler"]) == (False, 1.0, {})


@pytest.mark.parametrize("kind", ["fp16 Adam", "fp16 SGD"])
def test_a_scaler_state_that_cannot_be_changes_nothing(kind):
    engine, face = start(kind)
    train(face, engine.module, [1, 2])
    wrong = copy.deepcopy(face.state_dict())
    wrong["loss_scaler"]["hysteresis"] = 0
    train(face, engine.module, [3])
    before, state = masters(face), str(face.optimizer.state_dict())
    with pytest.raises(CheckpointError, match="no loss scaler can be in this state"):
        face.load_state_dict(wrong)
    assert torch.equal(masters(face), before)
    assert str(face.optimizer.state_dict()) == state


# -- two ranks --------------------------------------------------------------------------------------------------------


def by_hand_on_each_rank() -> dict[str, Any]:
    """Train with another batch on each rank; in step 2 rank 1 alone overflows."""
    rank = torch.distributed.get_rank()
    module = model()
    optimizer = torch.optim.AdamW(groups_of(module), **OPTIONS[torch.optim.AdamW])
    face = FP16_Optimizer(optimizer, static_loss_scale=256.0, clip_grad=0.5)
    skipped = train(face, module, [1 + rank, (3 + rank) * (-1 if rank else 1), 5 + rank])
    return {"skipped": skipped, "masters": masters(face), "norm": face._global_grad_norm}


def both_batches() -> dict[str, Any]:
    """Train with the two batches as one, in one process."""
    module = model()
    optimizer = torch.optim.AdamW(groups_of(module), **OPTIONS[torch.optim.AdamW])
    face = FP16_Optimizer(optimizer, static_loss_scale=256.0, clip_grad=0.5)
    for seeds in ((1, 2), (5, 6)):
        face.backward(sum(loss_of(module, seed) for seed in seeds) / 2)
        face.step()
    return {"masters": masters(face), "norm": face._global_grad_norm}


def test_ranks_average_and_agree():
    (first, second) = run_ranks([by_hand_on_each_rank], 2, env={"OMP_NUM_THREADS": "1"})[0]
    assert first["skipped"] == second["skipped"] == [False, True, False]
    assert torch.equal(first["masters"], second["masters"])
    alone = both_batches()
    assert first["norm"] == pytest.approx(alone["norm"], rel=2**-8)
    # fp16 gradients of the two ways round differently, by 2**-11 of each; Adam's step is at most about lr = 0.25 each,
    # and its ratio of moments carries a relative error of a gradient over to the update.
    torch.testing.assert_close(first["masters"], alone["masters"], rtol=0, atol=0.25 * 2 * 2**-6)
