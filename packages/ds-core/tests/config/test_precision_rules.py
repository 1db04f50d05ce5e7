"""Rules among the sections of low precision: the whole error of each, and what is allowed beside it."""

# ruff: noqa: E501 - a line of a message stands here as users see it

from __future__ import annotations

import copy
from typing import Any

import pytest

from ds_core.config import ConfigError, find_problems, load_config

BATCH = {"train_batch_size": 1}
LARGEST = (2 - 2.0**-23) * 2.0**127
"""The largest number in fp32."""


def fp16(**keys: Any) -> dict[str, Any]:
    return {"fp16": {"enabled": True, **keys}}


def bf16(**keys: Any) -> dict[str, Any]:
    return {"bf16": {"enabled": True, **keys}}


def autocast(**keys: Any) -> dict[str, Any]:
    return {"torch_autocast": {"enabled": True, **keys}}


def weights(dtype: str) -> dict[str, Any]:
    return {"data_types": {"param_dtype": dtype}}


def stage(number: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": number}}


def optimizer(name: str) -> dict[str, Any]:
    return {"optimizer": {"type": name, "params": {}}}


ERRORS: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "fp16 and bf16 and other weights",
        {**fp16(), **bf16(), **weights("fp32")},
        [
            "fp16.enabled: got true, and bf16.enabled is true as well",
            "  fix: enable one of the two, bf16 if the device has it",
        ],
    ),
    (
        "bf16 weights at fp32",
        weights("bf16"),
        [
            'data_types.param_dtype: got "bfloat16", but without fp16 and bf16 weights are "float32"',
            "  fix: remove it, or enable bf16",
        ],
    ),
    (
        "fp16 weights under autocast",
        {**weights("half"), **autocast(dtype="fp16")},
        [
            'data_types.param_dtype: got "float16", but without fp16 and bf16 weights are "float32"',
            "  fix: remove it, or enable fp16",
        ],
    ),
    (
        "bf16 weights at fp16",
        {**weights("bf16"), **fp16()},
        [
            'data_types.param_dtype: got "bfloat16", but with fp16 weights are "float16"',
            "  fix: remove it, or enable bf16 in place of fp16",
        ],
    ),
    (
        "fp32 weights at bf16",
        {**weights("torch.float32"), **bf16()},
        [
            'data_types.param_dtype: got "float32", but with bf16 weights are "bfloat16"',
            "  fix: remove it, or do not enable bf16",
        ],
    ),
    (
        "fp16 weights at a precision chosen by name",
        {**weights("fp16"), "precision": {"type": "bf16"}},
        [
            'data_types.param_dtype: got "float16", but with bf16 weights are "bfloat16"',
            "  fix: remove it, or enable fp16 in place of bf16",
        ],
    ),
    (
        "fp16 masters without ZeRO",
        fp16(fp16_master_weights_and_grads=True),
        [
            "fp16.fp16_master_weights_and_grads: got true, which needs ZeRO stage 1 to 3, and zero_optimization.stage is 0",
            "  fix: remove it",
        ],
    ),
    (
        "fp16 masters with ZeRO",
        {**fp16(fp16_master_weights_and_grads=True), **stage(2)},
        [
            "fp16.fp16_master_weights_and_grads: got true, which is not built yet; only false is accepted",
            "  fix: remove it",
        ],
    ),
    (
        "bf16 masters without ZeRO",
        bf16(bf16_master_weights_and_grads=True),
        [
            "bf16.bf16_master_weights_and_grads: got true, which needs ZeRO stage 1 to 3, and zero_optimization.stage is 0",
            "  fix: remove it",
        ],
    ),
    (
        "bf16 masters and states with ZeRO",
        {**bf16(bf16_master_weights_and_grads=True, bf16_optimizer_states=True), **stage(1)},
        [
            "2 problems in the configuration",
            "  bf16.bf16_master_weights_and_grads: got true, which is not built yet; only false is accepted",
            "    fix: remove it",
            "  bf16.bf16_optimizer_states: got true, which is not built yet; only false is accepted",
            "    fix: remove it",
        ],
    ),
    (
        "bf16 states without masters",
        bf16(bf16_optimizer_states=True),
        [
            "2 problems in the configuration",
            "  bf16.bf16_optimizer_states: got true, which needs ZeRO stage 1 to 3, and zero_optimization.stage is 0",
            "    fix: remove it",
            "  bf16.bf16_optimizer_states: got true, which needs bf16.bf16_master_weights_and_grads, and that is false",
            "    fix: remove it",
        ],
    ),
    (
        "start below the minimum",
        fp16(initial_scale_power=4, min_loss_scale=100),
        [
            "fp16.initial_scale_power: got 4, so the loss scale starts at 16, below fp16.min_loss_scale, 100",
            '  fix: set "min_loss_scale" to 16 or less, or "initial_scale_power" to 7 or more',
        ],
    ),
    (
        "start just below the minimum",
        fp16(initial_scale_power=0, min_loss_scale=2),
        [
            "fp16.initial_scale_power: got 0, so the loss scale starts at 1, below fp16.min_loss_scale, 2",
            '  fix: set "min_loss_scale" to 1 or less, or "initial_scale_power" to 1 or more',
        ],
    ),
    (
        "a minimum that no start reaches",
        fp16(initial_scale_power=127, min_loss_scale=2**127 + 1),
        [
            f"fp16.initial_scale_power: got 127, so the loss scale starts at {2**127}, below fp16.min_loss_scale, {2**127 + 1}",
            f'  fix: set "min_loss_scale" to {2**127} or less',
        ],
    ),
    (
        "zero window",
        fp16(loss_scale_window=0),
        [
            "fp16.loss_scale_window: got 0, must be at least 1",
            "  fix: write 1 or more, or remove it",
        ],
    ),
    (
        "negative window and zero minimum, chosen by name",
        {"fp16": {"loss_scale_window": -5, "min_loss_scale": 0}, "precision": {"type": "fp16"}},
        [
            "2 problems in the configuration",
            "  fp16.loss_scale_window: got -5, must be at least 1",
            "    fix: write 1 or more, or remove it",
            "  fp16.min_loss_scale: got 0, must be at least 1",
            "    fix: write 1 or more, or remove it",
        ],
    ),
    *(
        (
            f"{name} {value!r} of a section that is off",
            {"fp16": {name: value}},
            [f"fp16.{name}: got {shown}, must be a whole number"],
        )
        for name in ("loss_scale_window", "min_loss_scale")
        for value, shown in ((True, "true"), (float("inf"), "inf"), (float("nan"), "nan"), (0.5, "0.5"))
    ),
    *(
        (
            f"scale {value!r} of a section that is off",
            {"fp16": {"loss_scale": value}},
            [f"fp16.loss_scale: got {shown}, {why}"],
        )
        for value, shown, why in (
            (True, "true", "must be a finite number"),
            (float("nan"), "nan", "must be a finite number"),
            ("inf", '"inf"', "must be a finite number"),
            ("dynamic", '"dynamic"', "must be a finite number"),
            (-1, "-1", "must be at least 0"),
            ("-0.5", '"-0.5"', "must be at least 0"),
        )
    ),
    (
        "constant scale too big",
        fp16(loss_scale=1e39),
        [
            "fp16.loss_scale: got 1e+39, out of the range of fp32, 1.2e-38 to 3.4e+38",
            "  fix: set it to 0, which finds the scale while training",
        ],
    ),
    (
        "constant scale too small",
        fp16(loss_scale="1e-39"),
        [
            "fp16.loss_scale: got 1e-39, out of the range of fp32, 1.2e-38 to 3.4e+38",
            "  fix: set it to 0, which finds the scale while training",
        ],
    ),
    (
        "first scale too big",
        fp16(initial_scale_power=128, min_loss_scale=2**200),
        [
            "fp16.initial_scale_power: got 128, must be at most 127: 2**128 is infinite in fp32",
            "  fix: remove it: the scale then starts at 2**16",
        ],
    ),
    (
        "Lamb with a constant scale",
        {**fp16(loss_scale=128), **optimizer("Lamb")},
        [
            'fp16.loss_scale: got 128.0, and optimizer "Lamb" needs a scale found while training',
            "  fix: set it to 0",
        ],
    ),
    (
        "1-bit Lamb with a constant scale",
        {**fp16(loss_scale=1), **optimizer("OneBitLamb")},
        [
            'fp16.loss_scale: got 1.0, and optimizer "OneBitLamb" needs a scale found while training',
            "  fix: set it to 0",
        ],
    ),
    (
        "autocast to fp32",
        autocast(dtype="fp32"),
        [
            'torch_autocast.dtype: got "float32", and autocast to it changes nothing; allowed are "bfloat16" and "float16"',
            '  fix: set it to one of them, or "enabled" of "torch_autocast" to false',
        ],
    ),
    (
        "autocast to fp32 beside bf16",
        {**autocast(dtype="torch.float32"), **bf16()},
        [
            'torch_autocast.dtype: got "float32", and autocast to it changes nothing; allowed are "bfloat16" and "float16"',
            '  fix: set it to one of them, or "enabled" of "torch_autocast" to false',
        ],
    ),
    (
        "autocast to an unknown dtype",
        autocast(dtype="fp8"),
        [
            'torch_autocast.dtype: got "fp8", allowed are "float16", "bfloat16" or "float32"',
        ],
    ),
    (
        "autocast by default beside fp16",
        {**autocast(), **fp16()},
        [
            'torch_autocast.dtype: is "bfloat16", but with fp16 weights are "float16"',
            '  fix: set it to "float16", or enable one of fp16 and torch_autocast',
        ],
    ),
    (
        "autocast to fp16 beside bf16",
        {**autocast(dtype="half"), **bf16()},
        [
            'torch_autocast.dtype: is "float16", but with bf16 weights are "bfloat16"',
            '  fix: set it to "bfloat16", or enable one of bf16 and torch_autocast',
        ],
    ),
    (
        "one module outside a list",
        autocast(lower_precision_safe_modules="torch.nn.Linear"),
        [
            'torch_autocast.lower_precision_safe_modules: got "torch.nn.Linear", must be a list',
        ],
    ),
    (
        "names of modules that are not dotted",
        autocast(lower_precision_safe_modules=["Linear", "torch.nn.Linear", "torch..Linear"]),
        [
            "2 problems in the configuration",
            '  torch_autocast.lower_precision_safe_modules[0]: got "Linear", must be a dotted name such as "torch.nn.Linear"',
            '  torch_autocast.lower_precision_safe_modules[2]: got "torch..Linear", must be a dotted name such as "torch.nn.Linear"',
        ],
    ),
    (
        "unknown key of autocast",
        autocast(type="bf16"),
        [
            'torch_autocast.type: unknown key (its value is "bf16")',
            '  fix: did you mean "dtype"?',
        ],
    ),
    (
        "apex",
        {"amp": {"enabled": True, "opt_level": "O1"}},
        [
            "amp: this section is not built yet; it comes with a later release of ds-core",
            '  fix: remove "amp", or set its "enabled" to false',
        ],
    ),
    (
        "graphs",
        {"graph_harvesting": True},
        [
            "graph_harvesting: got true, which is not built yet; only false is accepted",
            "  fix: remove it",
        ],
    ),
    (
        "all together",
        {
            **fp16(initial_scale_power=0, min_loss_scale=8, loss_scale_window=0, fp16_master_weights_and_grads=True),
            **autocast(),
            **weights("fp32"),
            "communication_data_type": "int8",
        },
        [
            "6 problems in the configuration",
            '  communication_data_type: got "int8", allowed are "float16", "bfloat16" or "float32"',
            '  data_types.param_dtype: got "float32", but with fp16 weights are "float16"',
            "    fix: remove it, or do not enable fp16",
            "  fp16.fp16_master_weights_and_grads: got true, which needs ZeRO stage 1 to 3, and zero_optimization.stage is 0",
            "    fix: remove it",
            "  fp16.loss_scale_window: got 0, must be at least 1",
            "    fix: write 1 or more, or remove it",
            "  fp16.initial_scale_power: got 0, so the loss scale starts at 1, below fp16.min_loss_scale, 8",
            '    fix: set "min_loss_scale" to 1 or less, or "initial_scale_power" to 3 or more',
            '  torch_autocast.dtype: is "bfloat16", but with fp16 weights are "float16"',
            '    fix: set it to "float16", or enable one of fp16 and torch_autocast',
        ],
    ),
]

ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("weights as at fp32", weights("float")),
    ("weights as at fp16", {**weights("fp16"), **fp16()}),
    ("weights as at bf16", {**weights("torch.bfloat16"), **bf16()}),
    ("weights as under autocast", {**weights("fp32"), **autocast()}),
    ("weights as of a precision chosen by name", {**weights("fp16"), "precision": {"type": "fp16"}}),
    ("a stranger's weights", {**weights("bf16"), "precision": {"type": "fp8"}}),
    ("accumulation at fp16", {"data_types": {"grad_accum_dtype": "fp32", "buffer_dtype": "bf16"}, **fp16()}),
    ("reduction that loses digits", {"communication_data_type": "fp16", **bf16()}),
    ("masters of sections that are off", {"fp16": {"fp16_master_weights_and_grads": True}}),
    ("states of sections that are off", {"bf16": {"bf16_optimizer_states": True}}),
    ("a start at the minimum", fp16(initial_scale_power=4, min_loss_scale=16)),
    ("the largest start", fp16(initial_scale_power=127)),
    ("numbers as text", fp16(loss_scale="1024", loss_scale_window="5e2", min_loss_scale="2")),
    ("a constant scale ignores what finds one", fp16(loss_scale=8, loss_scale_window=0, min_loss_scale=-3)),
    ("a constant scale below the minimum", fp16(loss_scale=8, min_loss_scale=16, initial_scale_power=2)),
    ("a constant scale and no first one", fp16(loss_scale=8, initial_scale_power=400)),
    ("the largest constant scale", fp16(loss_scale=LARGEST)),
    ("the least constant scale", fp16(loss_scale=2.0**-126)),
    ("scales of a section that is off", {"fp16": {"initial_scale_power": 400, "min_loss_scale": -1}}),
    ("a constant scale of a section that is off", {"fp16": {"loss_scale": 1e300}, **optimizer("Lamb")}),
    ("Lamb with a found scale", {**fp16(), **optimizer("Lamb")}),
    ("Adam with a constant scale", {**fp16(loss_scale=8), **optimizer("Adam")}),
    ("autocast beside fp16", {**autocast(dtype="fp16"), **fp16()}),
    ("autocast beside bf16", {**autocast(), **bf16()}),
    ("autocast that is off", {"torch_autocast": {"dtype": "fp32"}, **fp16()}),
    ("null is the default", autocast(dtype=None, lower_precision_safe_modules=None)),
    ("no safe module", autocast(lower_precision_safe_modules=[])),
    ("gradients added at once", bf16(immediate_grad_update=True)),
    ("inputs cast to bf16", bf16(auto_cast=True)),
    ("what Accelerate writes for fp16", {"fp16": {"enabled": True, "auto_cast": True}, "bf16": {"enabled": False}}),
    ("what Accelerate writes for bf16", {"fp16": {"enabled": False}, **bf16(), "communication_data_type": "fp32"}),
    ("what Lightning writes", fp16(loss_scale=0.0, initial_scale_power=16, loss_scale_window=1000, hysteresis=2)),
]


@pytest.mark.parametrize(("config", "lines"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS])
def test_error(config: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({**BATCH, **config})
    assert [line for line in str(caught.value).split("\n") if line != "  where: config dict"] == lines


@pytest.mark.parametrize("config", [case[1] for case in ACCEPTED], ids=[case[0] for case in ACCEPTED])
def test_accepted(config: dict[str, Any]) -> None:
    given = copy.deepcopy(config)
    assert find_problems({**BATCH, **config}, dp_world_size=1) == []
    assert config == given


def test_a_rule_waits_for_sections_that_are_right_by_themselves() -> None:
    # Held against the default of a section that is itself wrong, a rule would speak of what nobody wrote.
    config = {"fp16": {"enabled": True, "loss_scale": -1}, **weights("fp32"), **autocast()}
    assert [problem.path for problem in find_problems(config)] == ["fp16.loss_scale"]
