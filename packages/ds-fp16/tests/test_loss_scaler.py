"""Loss scalers beside their rule: names, state, clamping, refusals, and the views DeepSpeed's wrappers show.

The rule itself is in test_loss_scaler_traces.py.
"""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
from torch import nn

import ds_fp16
from ds_core.config import load_config
from ds_core.errors import CheckpointError, ConfigError, DsError, LossScaleError
from ds_core.interfaces import precision as interfaces
from ds_fp16.loss_scaler import (
    LARGEST_SCALE,
    LOSS_SCALE_PROFILE_DEFAULTS,
    CreateLossScaler,
    DynamicLossScaler,
    LossScaleConfig,
    LossScaleProfile,
    LossScaler,
    LossScalerBase,
    get_loss_scaler,
    to_python_float,
)

ARGS = {"init_scale": 16, "scale_window": 2, "min_scale": 1, "delayed_shift": 2, "consecutive_hysteresis": False}


def dynamic(**changes) -> DynamicLossScaler:
    return DynamicLossScaler(**{**ARGS, **changes})


def configured(**fp16):
    return get_loss_scaler(load_config({"train_batch_size": 1, "fp16": {"enabled": True, **fp16}}))


def with_grads(*grads: torch.Tensor | None) -> list[nn.Parameter]:
    params = []
    for grad in grads:
        params.append(nn.Parameter(torch.zeros(3 if grad is None else grad.shape)))
        params[-1].grad = grad
    return params


def test_the_words_of_the_settings_are_arguments_of_the_scaler() -> None:
    words = {
        ds_fp16.INITIAL_LOSS_SCALE: 16,
        ds_fp16.SCALE_WINDOW: 2,
        ds_fp16.MIN_LOSS_SCALE: 1,
        ds_fp16.DELAYED_SHIFT: 2,
        ds_fp16.CONSECUTIVE_HYSTERESIS: False,
    }
    assert words == ARGS


def test_attributes_are_those_deepspeed_pickles() -> None:
    assert vars(dynamic()) == {
        "cur_scale": 16,
        "cur_iter": 0,
        "last_overflow_iter": -1,
        "scale_factor": 2.0,
        "scale_window": 2,
        "min_scale": 1,
        "delayed_shift": 2,
        "cur_hysteresis": 2,
        "consecutive_hysteresis": False,
        "raise_error_at_min_scale": True,
        "dynamic": True,
        "dtype": torch.float16,
    }
    assert vars(LossScaler(8)) == {"cur_scale": 8, "dynamic": False}


def test_an_object_of_these_attributes_alone_works() -> None:
    # What reading DeepSpeed's pickle gives: no constructor runs.
    scaler = DynamicLossScaler.__new__(DynamicLossScaler)
    scaler.__dict__.update(vars(dynamic(delayed_shift=1)))
    scaler.update_scale(True)
    assert (scaler.scale, scaler.loss_scale, scaler.state_dict()["iteration"]) == (8.0, 8.0, 1)
    static = LossScaler.__new__(LossScaler)
    static.__dict__.update(cur_scale=4, dynamic=False)
    assert static.scale == 4.0


@pytest.mark.parametrize("again", [copy.deepcopy, lambda scaler: pickle.loads(pickle.dumps(scaler))])
@pytest.mark.parametrize("scaler", [dynamic(), LossScaler(2)])
def test_a_copy_is_another_scaler(scaler, again) -> None:
    copied = again(scaler)
    assert vars(copied) == vars(scaler)
    before = dict(vars(scaler))
    copied.cur_scale = 1
    assert vars(scaler) == before


@pytest.mark.parametrize("held", [torch.tensor([1.5]), torch.tensor(1.5), [1.5, 2.0], (1.5,)])
def test_to_python_float(held) -> None:
    found = to_python_float(held)
    assert type(found) is float
    assert found == 1.5


class TestEveryScaler:
    @pytest.fixture(params=[LossScalerBase(8), LossScaler(8), dynamic(init_scale=8)], ids=lambda s: type(s).__name__)
    def scaler(self, request):
        return request.param

    def test_it_is_one_of_the_seam(self, scaler) -> None:
        assert isinstance(scaler, interfaces.LossScaler)
        assert (scaler.scale, scaler.loss_scale) == (8.0, 8)
        assert type(scaler.scale) is float

    def test_the_loss_is_scaled(self, scaler) -> None:
        assert scaler.scale_loss(torch.tensor(0.5)).item() == 4.0

    def test_backward_gives_scaled_gradients(self, scaler) -> None:
        weight = torch.tensor([1.0, 2.0], requires_grad=True)
        loss = (weight * 3).sum()
        scaler.backward(loss, retain_graph=True)
        assert weight.grad.tolist() == [24.0, 24.0]
        scaler.backward(loss)
        assert weight.grad.tolist() == [48.0, 48.0]
        with pytest.raises(RuntimeError, match="second time"):
            scaler.backward(loss)

    def test_a_hook_scales_gradients(self, scaler) -> None:
        layer = nn.Linear(2, 1)
        layer.register_full_backward_hook(scaler.scale_gradient)
        x = torch.ones(1, 2, requires_grad=True)
        layer(x).sum().backward()
        assert torch.equal(x.grad, layer.weight.detach() * 8)
        assert scaler.scale_gradient(layer, (None, torch.ones(1)), ()) == (None, torch.tensor([8.0]))


class TestOverflow:
    BAD = (math.inf, -math.inf, math.nan)

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("place", [0, 6])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_one_bad_element_is_found(self, bad: float, place: int, dtype: torch.dtype) -> None:
        grad = torch.ones(7, dtype=dtype)
        grad[place] = bad
        param = nn.Parameter(torch.zeros(7, dtype=dtype))
        param.grad = grad
        assert LossScalerBase._has_inf_or_nan(grad) is True
        # DeepSpeed's raised TypeError as soon as a parameter had a gradient.
        assert dynamic().has_overflow_serial([param]) is True
        assert dynamic().has_overflow([*with_grads(None, torch.ones(2)), param]) is True

    @pytest.mark.parametrize("grad", [torch.zeros(0), torch.zeros(3), torch.full((9,), 60000.0).half()])
    def test_finite_gradients_are_no_overflow(self, grad: torch.Tensor) -> None:
        # The sum of the last one is inf in fp16.
        params = [nn.Parameter(torch.zeros_like(grad))]
        params[0].grad = grad
        assert dynamic().has_overflow_serial(params) is False
        assert dynamic().has_overflow(params) is False

    def test_no_gradient_is_no_overflow(self) -> None:
        assert dynamic().has_overflow_serial(with_grads(None)) is False
        assert dynamic().has_overflow([]) is False

    def test_a_static_scaler_does_not_look(self) -> None:
        assert LossScaler(8).has_overflow(with_grads(torch.tensor([math.nan]))) is False


class TestState:
    def moved(self) -> DynamicLossScaler:
        scaler = dynamic(init_scale=64, delayed_shift=4)
        for overflow in (True, True, True, True, True, False):
            scaler.update_scale(overflow)
        return scaler

    def test_it_is_what_training_changes(self) -> None:
        state = self.moved().state_dict()
        assert state == {"scale": 16.0, "iteration": 6, "last_overflow_iteration": 4, "hysteresis": 1}
        assert json.loads(json.dumps(state)) == state

    def test_it_goes_round(self) -> None:
        loaded = dynamic(init_scale=64, delayed_shift=4)
        loaded.load_state_dict(self.moved().state_dict())
        assert vars(loaded) == vars(self.moved())

    def test_settings_are_those_of_the_new_scaler(self) -> None:
        loaded = dynamic(scale_window=7, min_scale=2, delayed_shift=3, consecutive_hysteresis=True)
        loaded.load_state_dict(self.moved().state_dict())
        assert (loaded.scale_window, loaded.min_scale, loaded.delayed_shift) == (7, 2, 3)
        assert loaded.consecutive_hysteresis is True
        assert (loaded.cur_scale, loaded.cur_iter, loaded.last_overflow_iter) == (16.0, 6, 4)

    def test_a_scale_below_the_new_minimum_becomes_the_minimum(self) -> None:
        loaded = dynamic(init_scale=64, min_scale=32)
        loaded.load_state_dict(self.moved().state_dict())
        assert loaded.cur_scale == 32.0

    def test_no_more_hysteresis_is_left_than_there_is(self) -> None:
        fresh = dynamic(delayed_shift=4).state_dict()
        assert fresh["hysteresis"] == 4
        fewer = dynamic(delayed_shift=2)
        fewer.load_state_dict(fresh)
        assert fewer.cur_hysteresis == 2
        more = dynamic(delayed_shift=9)
        more.load_state_dict(fresh)
        assert more.cur_hysteresis == 4

    def test_a_static_scaler_keeps_its_scale(self) -> None:
        scaler = LossScaler(8)
        scaler.load_state_dict(self.moved().state_dict())
        assert scaler.cur_scale == 8
        assert scaler.state_dict() == {}

    @pytest.mark.parametrize("state", [{}, {"good": 3}])
    def test_the_state_of_another_kind_of_scaler_changes_nothing(self, state: dict) -> None:
        loaded = dynamic()
        loaded.load_state_dict(LossScaler(2).state_dict() | state)
        assert vars(loaded) == vars(dynamic())

    @pytest.mark.parametrize(
        "wrong",
        [
            {"scale": math.inf},
            {"scale": math.nan},
            {"scale": 0.0},
            {"scale": -2.0},
            {"scale": 2.0**128},
            {"scale": "16"},
            {"scale": True},
            {"iteration": -1},
            {"last_overflow_iteration": -2},
            {"last_overflow_iteration": 99},
            {"hysteresis": 0},
            {"hysteresis": None},
        ],
        ids=str,
    )
    def test_an_impossible_state_is_refused_whole(self, wrong: dict) -> None:
        loaded = dynamic()
        with pytest.raises(CheckpointError) as caught:
            loaded.load_state_dict(self.moved().state_dict() | wrong)
        (name, value), *_ = wrong.items()
        assert name in caught.value.what
        assert repr(value) in caught.value.what
        assert caught.value.where == "state of the loss scaler"
        assert caught.value.fix is not None
        assert vars(loaded) == vars(dynamic())


class TestErrors:
    def test_at_the_minimum(self) -> None:
        scaler = dynamic(init_scale=2, delayed_shift=1)
        scaler.update_scale(True)
        with pytest.raises(LossScaleError) as caught:
            scaler.update(overflowed=True)
        assert str(caught.value) == (
            "gradients hold inf or NaN at loss scale 1, the smallest allowed\n"
            "  where: loss scaler, optimizer step 2\n"
            "  fix: look for inf or NaN in data, loss and weights; lower the learning rate; or train in bf16"
        )

    def test_a_scale_set_below_the_minimum_does_not_rise_by_an_overflow(self) -> None:
        scaler = dynamic(min_scale=4, delayed_shift=1, raise_error_at_min_scale=False)
        scaler.cur_scale = 2
        scaler.update_scale(True)
        assert scaler.cur_scale == 2

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"init_scale": 0}, "cur_scale is 0"),
            ({"init_scale": -1}, "cur_scale is -1"),
            ({"init_scale": math.nan}, "cur_scale is nan"),
            ({"init_scale": 2**128}, "a number above 0 that fp32 can hold"),
            ({"scale_window": 0}, "scale_window is 0, allowed is at least 1"),
            ({"delayed_shift": 0}, "delayed_shift is 0, allowed is at least 1"),
            ({"min_scale": 0}, "min_scale is 0, allowed is above 0"),
            ({"min_scale": 17}, "min_scale is 17, allowed is above 0 and at most init_scale, 16"),
        ],
    )
    def test_settings_out_of_range(self, wrong: dict, words: str) -> None:
        with pytest.raises(ConfigError) as caught:
            dynamic(**wrong)
        assert words in caught.value.what
        assert caught.value.where == "loss scaler"
        assert caught.value.fix is not None

    @pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan])
    def test_a_static_scale_is_a_factor(self, scale: float) -> None:
        with pytest.raises(ConfigError, match="cur_scale is"):
            LossScaler(scale)

    def test_the_largest_scale_is_allowed(self) -> None:
        assert torch.tensor(LossScaler(LARGEST_SCALE).scale).isfinite()


class TestCreateLossScaler:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("dynamic_scaling", [True, False])
    def test_only_fp16_is_scaled(self, dtype: torch.dtype, dynamic_scaling: bool) -> None:
        scaler = CreateLossScaler(dtype, 8.0, dynamic_scaling, None)
        assert type(scaler) is LossScaler
        assert scaler.scale == 1.0

    def test_static(self) -> None:
        scaler = CreateLossScaler(torch.half, static_loss_scale=8.0, dynamic_scaling=False, dynamic_loss_args=None)
        assert type(scaler) is LossScaler
        assert (scaler.scale, scaler.dynamic) == (8.0, False)

    def test_dynamic(self) -> None:
        scaler = CreateLossScaler(torch.half, 1.0, True, ARGS)
        assert type(scaler) is DynamicLossScaler
        assert vars(scaler) == vars(dynamic())

    def test_dynamic_without_settings(self) -> None:
        with pytest.raises(DsError, match="dynamic loss scaling needs its settings, got None") as caught:
            CreateLossScaler(torch.half, 1.0, True, None)
        assert "init_scale" in caught.value.fix


class TestOfAConfiguration:
    def test_the_defaults(self) -> None:
        scaler = configured()
        assert isinstance(scaler, DynamicLossScaler)
        assert vars(scaler) == vars(
            DynamicLossScaler(2**16, scale_window=1000, min_scale=1, delayed_shift=2, consecutive_hysteresis=False)
        )

    def test_every_key(self) -> None:
        keys = {"initial_scale_power": 5, "loss_scale_window": 7, "min_loss_scale": 4, "hysteresis": 3}
        scaler = configured(**keys, consecutive_hysteresis=True)
        assert (scaler.cur_scale, scaler.scale_window, scaler.min_scale, scaler.delayed_shift) == (32, 7, 4, 3)
        assert scaler.consecutive_hysteresis is True
        assert scaler.raise_error_at_min_scale is True

    def test_static(self) -> None:
        # The settings of the dynamic scale are not looked at, so they may be anything.
        scaler = configured(loss_scale=128, initial_scale_power=10**9, min_loss_scale=0)
        assert type(scaler) is LossScaler
        assert scaler.scale == 128.0

    def test_a_scale_that_starts_below_the_minimum_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"fp16\.min_loss_scale"):
            configured(initial_scale_power=3, min_loss_scale=9)

    def test_another_precision_is_not_scaled(self) -> None:
        for data in ({}, {"fp16": {"enabled": False, "loss_scale": 8}}, {"bf16": {"enabled": True}}):
            assert get_loss_scaler(load_config({"train_batch_size": 1, **data})).scale == 1.0

    def test_a_precision_chosen_by_its_name_has_its_section(self) -> None:
        config = load_config({"train_batch_size": 1, "precision": {"type": "fp16"}, "fp16": {"loss_scale": 8}})
        assert get_loss_scaler(config).scale == 8.0


class TestLossScaleConfig:
    def seen(self, config: LossScaleConfig) -> tuple:
        return (
            config.use_grad_scaling,
            config.dynamic_loss_scale,
            config.cur_scale,
            config.cur_iter,
            config.last_overflow_iter,
            config.scale_factor,
            config.scale_window,
            config.min_loss_scale,
        )

    @pytest.mark.parametrize(
        ("profile", "initial", "scale", "minimum"),
        [
            (LossScaleProfile.FUSED, None, 2.0**32, 1.0),
            (LossScaleProfile.FUSED, 2.0**20, 2.0**20, 1.0),
            (LossScaleProfile.UNFUSED, None, 2.0**16, 0.25),
        ],
    )
    def test_profiles(self, profile: LossScaleProfile, initial: float | None, scale: float, minimum: float) -> None:
        config = LossScaleConfig(torch.half, True, 1.0, None, profile=profile, initial_dynamic_scale=initial)
        assert self.seen(config) == (True, True, scale, 0, -1, 2.0, 1000, minimum)

    def test_profiles_as_data(self) -> None:
        fused, unfused = (LOSS_SCALE_PROFILE_DEFAULTS[profile] for profile in LossScaleProfile)
        assert (fused.init_scale, fused.scale_window, fused.min_loss_scale, fused.scale_factor) == (2**32, 1000, 1, 2)
        assert (unfused.init_scale, unfused.scale_window, unfused.min_loss_scale) == (2**16, 1000, 0.25)

    def test_settings_win_over_the_profile(self) -> None:
        config = LossScaleConfig(torch.half, True, 1.0, ARGS, initial_dynamic_scale=2.0**20)
        assert self.seen(config) == (True, True, 16, 0, -1, 2.0, 2, 1)
        assert config.scaler.delayed_shift == 2

    def test_without_settings_each_overflow_halves_as_in_deepspeed(self) -> None:
        config = LossScaleConfig(torch.half, True, 1.0, None)
        config.scaler.update_scale(True)
        assert self.seen(config)[2:5] == (2.0**31, 1, 0)

    def test_static(self) -> None:
        config = LossScaleConfig(torch.half, False, 64.0, None)
        config.scaler.update_scale(True)
        assert self.seen(config) == (True, False, 64.0, 0, None, None, None, None)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_without_scaling(self, dtype: torch.dtype) -> None:
        config = LossScaleConfig(dtype, True, 64.0, ARGS)
        assert self.seen(config) == (False, False, 1.0, None, None, None, None, None)

    def test_it_is_a_view(self) -> None:
        scaler = dynamic()
        config = LossScaleConfig.of(scaler, torch.half)
        config.cur_scale = 4
        assert scaler.scale == 4.0
        scaler.update_scale(False)
        assert self.seen(config) == (True, True, 4, 1, -1, 2.0, 2, 1)
