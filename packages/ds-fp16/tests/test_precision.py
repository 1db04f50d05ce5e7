"""Plans, scalers and the overflow rule of the three precisions; the contract of the seam is in its own file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ds_core import registry
from ds_core.config import load_config
from ds_core.errors import ConfigError, LossScaleError
from ds_core.interfaces.precision import PrecisionPlan
from ds_fp16.loss_scaler import DynamicLossScaler, LossScaler
from ds_fp16.precision import Bf16, Fp16, TorchAutocast

if TYPE_CHECKING:
    from ds_core.interfaces.precision import Precision

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
SAFE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Mine(nn.Linear):
    """A class of this module, for lists of safe modules."""


def build(**sections: Any) -> Precision:
    """Return what an engine would build."""
    config = load_config({"train_batch_size": 1, **sections})
    name = next(name for name in ("fp16", "bf16", "torch_autocast") if getattr(config, name).enabled)
    return registry.load("precision", name, needed_by="the test")(config)


ON = {"enabled": True}
PLANS = {
    "fp16": ({"fp16": ON}, PrecisionPlan(stored=FP16, master=FP32, reduce=FP16)),
    "bf16": ({"bf16": ON}, PrecisionPlan(stored=BF16, master=FP32, reduce=BF16)),
    "autocast": ({"torch_autocast": ON}, PrecisionPlan(autocast=BF16, reduce=BF16, reduce_in=SAFE)),
    "autocast to fp16": (
        {"torch_autocast": {"enabled": True, "dtype": "fp16"}},
        PrecisionPlan(autocast=FP16, reduce=FP16, reduce_in=SAFE),
    ),
    "fp16, inputs cast": (
        {"fp16": {"enabled": True, "auto_cast": True}},
        PrecisionPlan(stored=FP16, master=FP32, reduce=FP16, input_cast=FP16),
    ),
    "bf16, inputs cast": (
        {"bf16": {"enabled": True, "auto_cast": True}},
        PrecisionPlan(stored=BF16, master=FP32, reduce=BF16, input_cast=BF16),
    ),
    "bf16 and autocast": (
        {"bf16": ON, "torch_autocast": ON},
        PrecisionPlan(stored=BF16, master=FP32, reduce=BF16, autocast=BF16),
    ),
    "fp16 and autocast": (
        {"fp16": ON, "torch_autocast": {"enabled": True, "dtype": "fp16"}},
        PrecisionPlan(stored=FP16, master=FP32, reduce=FP16, autocast=FP16),
    ),
    "bf16, data types": (
        {"bf16": ON, "data_types": {"grad_accum_dtype": "fp32", "buffer_dtype": "bf16"}},
        PrecisionPlan(stored=BF16, master=FP32, reduce=BF16, accumulate=FP32, buffer=BF16),
    ),
    "fp16, communication in fp32": (
        {"fp16": ON, "communication_data_type": "fp32"},
        PrecisionPlan(stored=FP16, master=FP32, reduce=FP32),
    ),
    "autocast, all communication in fp32": (
        {"torch_autocast": ON, "communication_data_type": "fp32"},
        PrecisionPlan(autocast=BF16, reduce=FP32),
    ),
    "autocast, safe modules": (
        {
            "torch_autocast": {
                "enabled": True,
                "lower_precision_safe_modules": ["torch.nn.Embedding", "torch.nn.Linear"],
            }
        },
        PrecisionPlan(autocast=BF16, reduce=BF16, reduce_in=(nn.Embedding, nn.Linear)),
    ),
    "autocast, no safe modules": (
        {"torch_autocast": {"enabled": True, "lower_precision_safe_modules": []}},
        PrecisionPlan(autocast=BF16, reduce=BF16, reduce_in=()),
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str) -> None:
    sections, expected = PLANS[name]
    assert build(**sections).plan == expected


def test_a_section_that_is_off_changes_nothing() -> None:
    autocast = {"enabled": False, "dtype": "fp16", "lower_precision_safe_modules": ["no.such.Thing"]}
    assert build(bf16=ON, torch_autocast=autocast).plan == PLANS["bf16"][1]


def test_parameters_of_safe_modules_alone_travel_in_the_lower_precision() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), Mine(2, 2))
    dtypes = build(torch_autocast=ON).plan.dtypes_of(model)
    # Exactly those classes: a subclass may do other things with its parameters.
    assert [dtypes[param].reduce for param in model.parameters()] == [BF16, BF16, FP32, FP32, FP32, FP32]
    assert {dtypes[param].stored for param in model.parameters()} == {FP32}
    assert {dtypes[param].master for param in model.parameters()} == {None}


@pytest.mark.parametrize("sections", [{}, {"bf16": ON}], ids=["alone", "with bf16"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("torch.nn.Linea", "torch.nn has no 'Linea'"),
        ("no_such_module.Linear", "no module is called 'no_such_module'"),
        ("torch.nn.functional.relu", "it is a function, not a class"),
        ("torch.Tensor", "it is not a subclass of torch.nn.Module"),
    ],
)
def test_an_unknown_class_is_named(sections: dict, name: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**sections, torch_autocast={"enabled": True, "lower_precision_safe_modules": ["torch.nn.Linear", name]})
    assert caught.value.where == "torch_autocast.lower_precision_safe_modules"
    assert repr(name) in caught.value.what
    assert why in caught.value.what
    assert caught.value.fix is not None


class TestScalers:
    def test_fp16_is_scaled_as_its_section_says(self) -> None:
        scaler = build(fp16={"enabled": True, "initial_scale_power": 4, "hysteresis": 3}).scaler
        assert isinstance(scaler, DynamicLossScaler)
        assert (scaler.scale, scaler.delayed_shift) == (16.0, 3)

    def test_a_static_scale_stays_whatever_happens(self) -> None:
        precision = build(fp16={"enabled": True, "loss_scale": 128})
        assert isinstance(precision.scaler, LossScaler)
        for _ in range(5):
            assert precision.overflowed(math.inf) is True
            precision.after_step(skipped=True)
        assert precision.scaler.scale == 128.0

    @pytest.mark.parametrize("sections", [{"bf16": ON}, {"torch_autocast": ON}, {"bf16": ON, "torch_autocast": ON}])
    def test_bf16_is_not_scaled(self, sections: dict) -> None:
        precision = build(**sections)
        assert isinstance(precision.scaler, LossScaler)
        for skipped in (True, False):
            precision.after_step(skipped=skipped)
            assert (precision.scaler.scale, precision.scaler.cur_scale, precision.scaler.dynamic) == (1.0, 1.0, False)

    def test_autocast_to_fp16_has_the_numbers_of_torchs_scaler(self) -> None:
        scaler = build(torch_autocast={"enabled": True, "dtype": "fp16"}).scaler
        torchs = torch.amp.GradScaler("cpu")
        assert isinstance(scaler, DynamicLossScaler)
        assert scaler.scale == torchs.get_scale()
        assert scaler.scale_window == torchs.get_growth_interval()
        assert (scaler.scale_factor, 1 / scaler.scale_factor) == (
            torchs.get_growth_factor(),
            torchs.get_backoff_factor(),
        )
        assert (scaler.delayed_shift, scaler.min_scale, scaler.dtype) == (1, 1.0, FP16)

    def test_fp16_with_autocast_has_one_scaler_that_of_fp16(self) -> None:
        precision = build(
            fp16={"enabled": True, "initial_scale_power": 4}, torch_autocast={"enabled": True, "dtype": "fp16"}
        )
        assert precision.scaler.scale == 16.0

    def test_at_the_minimum_the_step_raises(self) -> None:
        precision = build(fp16={"enabled": True, "initial_scale_power": 0, "hysteresis": 1})
        with pytest.raises(LossScaleError):
            precision.after_step(skipped=True)


SKIPS = {
    "fp16": ({"fp16": ON}, True),
    "fp16, static scale": ({"fp16": {"enabled": True, "loss_scale": 4}}, True),
    "fp16 and autocast": ({"fp16": ON, "torch_autocast": {"enabled": True, "dtype": "fp16"}}, True),
    "autocast to fp16": ({"torch_autocast": {"enabled": True, "dtype": "fp16"}}, True),
    "bf16": ({"bf16": ON}, True),
    "bf16, not checked": ({"bf16": {"enabled": True, "check_grad_overflow": False}}, False),
    "bf16 and autocast, not checked": (
        {"bf16": {"enabled": True, "check_grad_overflow": False}, "torch_autocast": ON},
        False,
    ),
    "autocast to bf16": ({"torch_autocast": ON}, True),
}


@pytest.mark.parametrize("name", SKIPS)
def test_what_is_skipped(name: str) -> None:
    sections, skips = SKIPS[name]
    precision = build(**sections)
    assert precision.skips_overflow is skips
    assert [precision.overflowed(norm) for norm in (math.inf, -math.inf, math.nan)] == [skips] * 3
    # A norm of zero is a valid step, and so is the largest number.
    assert [precision.overflowed(norm) for norm in (0.0, 1.0, 1.7e308)] == [False] * 3


@pytest.mark.parametrize(("name", "cls"), [("fp16", Fp16), ("bf16", Bf16), ("torch_autocast", TorchAutocast)])
def test_chosen_by_its_name(name: str, cls: type[Precision]) -> None:
    assert registry.load("precision", name, needed_by="the test") is cls
    by_name = cls(load_config({"train_batch_size": 1, "precision": {"type": name}}))
    by_section = cls(load_config({"train_batch_size": 1, name: ON}))
    assert by_name.plan == by_section.plan
    assert by_name.scaler.scale == by_section.scaler.scale
