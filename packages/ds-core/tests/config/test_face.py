"""DeepSpeedConfig: DeepSpeed's names for a checked configuration."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest

import ds_core
from ds_core.config import ConfigError, DeepSpeedConfig, DeepSpeedConfigError
from ds_core.errors import NotBuiltError

GIVEN = {
    "train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 7},
    "fp16": {"enabled": True},
    "optimizer": {"type": "Adam", "params": {"lr": 1}},
}


def test_attributes() -> None:
    config = DeepSpeedConfig(GIVEN)
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (
        8,
        4,
        2,
    )
    assert (config.zero_enabled, config.zero_optimization_stage, config.zero_config.reduce_bucket_size) == (True, 2, 7)
    assert (config.float16_config.enabled, config.bfloat16_config.enabled) == (True, False)
    assert (config.gradient_clipping, config.steps_per_print) == (1.0, None)
    assert (config.optimizer_name, config.optimizer_params) == ("Adam", {"lr": 1})
    assert (config.scheduler_name, config.scheduler_params) == (None, None)


def test_no_such_attribute() -> None:
    with pytest.raises(AttributeError, match="zork"):
        _ = DeepSpeedConfig(GIVEN).zork


def test_can_be_copied() -> None:
    assert copy.deepcopy(DeepSpeedConfig(GIVEN)).train_batch_size == 8


def test_ranks_of_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    initialised = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2)
    monkeypatch.setitem(sys.modules, "torch.distributed", initialised)
    assert DeepSpeedConfig(GIVEN).train_micro_batch_size_per_gpu == 2


@pytest.mark.parametrize("name", ["mpu", "mesh_device"])
def test_groups_are_not_built(name: str) -> None:
    with pytest.raises(NotBuiltError, match=f"DeepSpeedConfig\\({name}=...\\) is not built yet"):
        DeepSpeedConfig(GIVEN, **{name: object()})


def test_root_names() -> None:
    assert ds_core.DeepSpeedConfig is DeepSpeedConfig
    assert ds_core.DeepSpeedConfigError is DeepSpeedConfigError is ConfigError
