"""Sections of the precisions: spellings, defaults and helpers."""

from __future__ import annotations

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
