"""Rules among the sections of low precision: what is allowed; what is not is in ``bad/``, with the whole error."""

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


OFF: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, f"fp16.{name}: got {shown}, must be a whole number")
        for name in ("loss_scale_window", "min_loss_scale")
        for value, shown in ((True, "true"), (float("inf"), "inf"), (float("nan"), "nan"), (0.5, "0.5"))
    ),
    *(
        ({"loss_scale": value}, f"fp16.loss_scale: got {shown}, {why}")
        for value, shown, why in (
            (True, "true", "must be a finite number"),
            (float("nan"), "nan", "must be a finite number"),
            ("inf", '"inf"', "must be a finite number"),
            ("dynamic", '"dynamic"', "must be a finite number"),
            (-1, "-1", "must be at least 0"),
            ("-0.5", '"-0.5"', "must be at least 0"),
        )
    ),
]
"""Keys of ``fp16`` that is off, and the error: a key's own type holds whether or not its section is on."""

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


@pytest.mark.parametrize(("keys", "what"), OFF)
def test_a_wrong_type_in_a_section_that_is_off(keys: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({**BATCH, "fp16": keys})
    assert caught.value.what == what


@pytest.mark.parametrize("config", [case[1] for case in ACCEPTED], ids=[case[0] for case in ACCEPTED])
def test_accepted(config: dict[str, Any]) -> None:
    given = copy.deepcopy(config)
    assert find_problems({**BATCH, **config}, dp_world_size=1) == []
    assert config == given


def test_a_rule_waits_for_what_it_reads() -> None:
    # Held against the default of a key that is itself wrong, a rule would speak of what nobody wrote.
    config = {"fp16": {"enabled": "often"}, **weights("fp32"), **autocast()}
    assert [problem.path for problem in find_problems(config)] == ["fp16.enabled"]


def test_a_rule_does_not_wait_for_what_it_does_not_read() -> None:
    config = {"fp16": {"enabled": True, "loss_scale": -1, "zork": 1}, "bf16": {"enabled": True}}
    assert [problem.path for problem in find_problems(config)] == ["fp16.enabled", "fp16.loss_scale", "fp16.zork"]
