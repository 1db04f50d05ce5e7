"""Sections of the precisions: spellings, defaults and helpers."""

from __future__ import annotations

import pydoc
from typing import Any

import pytest
import torch

from ds_core.config import Config, DataTypesSection, load_config


def load(**values: Any) -> Config:
    return load_config({"train_batch_size": 1, **values})


SPELLINGS = [
    *((written, "float16") for written in ("fp16", "float16", "half", "torch.float16", torch.float16)),
    *((written, "bfloat16") for written in ("bf16", "bfloat16", "torch.bfloat16", torch.bfloat16)),
    *((written, "float32") for written in ("fp32", "float32", "float", "torch.float32", torch.float32)),
    *((written, None) for written in (None, "auto")),
]


@pytest.mark.parametrize(("written", "meant"), SPELLINGS)
@pytest.mark.parametrize("name", DataTypesSection.model_fields)
def test_data_types(name: str, written: Any, meant: str | None) -> None:
    modes = {"float16": {"fp16": {"enabled": True}}, "bfloat16": {"bf16": {"enabled": True}}}
    config = load(data_types={name: written}, **modes.get(meant or "", {}))
    assert getattr(config.data_types, name) == meant


@pytest.mark.parametrize(("written", "meant"), SPELLINGS)
def test_communication_data_type(written: Any, meant: str | None) -> None:
    assert load(communication_data_type=written).communication_data_type == meant


@pytest.mark.parametrize("written", ["fp32", "torch.float32", "auto"])
def test_communication_data_type_of_sequences_may_be_its_default(written: str) -> None:
    config = load(seq_parallel_communication_data_type=written)
    assert config.seq_parallel_communication_data_type == "float32"


def test_dtypes_not_given() -> None:
    config = load()
    assert config.data_types == DataTypesSection(grad_accum_dtype=None, param_dtype=None, buffer_dtype=None)
    assert config.communication_data_type is None


def test_autocast_not_given() -> None:
    section = load(torch_autocast={"enabled": True, "dtype": None, "lower_precision_safe_modules": None}).torch_autocast
    assert section.dtype == "bfloat16"
    found = [pydoc.locate(name) for name in section.lower_precision_safe_modules]
    assert found == [torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d]


def test_safe_modules_keep_their_order() -> None:
    names = ["torch.nn.LayerNorm", "torch.nn.Linear"]
    section = load(torch_autocast={"lower_precision_safe_modules": names}).torch_autocast
    assert section.lower_precision_safe_modules == tuple(names)


def test_casts_are_off_unless_given() -> None:
    assert (load().fp16.auto_cast, load().bf16.auto_cast) == (False, False)
    config = load(fp16={"auto_cast": True}, bf16={"auto_cast": True})
    assert (config.fp16.auto_cast, config.bf16.auto_cast) == (True, True)


def test_what_a_dynamic_scaler_is_made_of() -> None:
    section = load(
        fp16={
            "initial_scale_power": "20",
            "loss_scale_window": 500.0,
            "hysteresis": 4,
            "consecutive_hysteresis": True,
            "min_loss_scale": 8,
        }
    ).fp16
    assert section.initial_dynamic_scale() == 2**20
    assert section.dynamic_loss_scale_args() == {
        "init_scale": 2**20,
        "scale_window": 500,
        "delayed_shift": 4,
        "consecutive_hysteresis": True,
        "min_scale": 8,
    }


def test_what_a_dynamic_scaler_is_made_of_by_default() -> None:
    assert load().fp16.dynamic_loss_scale_args() == {
        "init_scale": 65536,
        "scale_window": 1000,
        "delayed_shift": 2,
        "consecutive_hysteresis": False,
        "min_scale": 1,
    }
