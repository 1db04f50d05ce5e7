"""A device that cannot: one clear error, before a process group or a device is touched."""

from __future__ import annotations

import pytest
import torch

import ds_core
from ds_core import comm
from ds_core.accelerator.cpu import CpuAccelerator
from ds_core.engine import build
from ds_core.errors import ConfigError

CONFIG = {"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


class OldDevice(CpuAccelerator):
    """Computes in fp32 and in one more dtype."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self.dtypes = [torch.float32, *dtypes]

    def supported_dtypes(self):
        return self.dtypes


def start(section, **options):
    return ds_core.initialize(model=torch.nn.Linear(2, 1), config={**CONFIG, section: {"enabled": True, **options}})[0]


CASES = {
    "fp16": ({}, "float16", torch.bfloat16),
    "bf16": ({}, "bfloat16", torch.float16),
    "torch_autocast": ({"dtype": "fp16"}, "float16", torch.bfloat16),
}


@pytest.mark.parametrize("section", CASES)
def test_what_a_device_cannot_is_refused_at_once(section, monkeypatch):
    options, missing, other = CASES[section]
    monkeypatch.setattr(build, "get_accelerator", lambda: OldDevice(other))
    with pytest.raises(ConfigError) as raised:
        start(section, **options)
    assert str(raised.value) == (
        f"this device cannot train in torch.{missing}; it can in float32, {str(other).removeprefix('torch.')}\n"
        f"  where: {section}.enabled, device 'cpu'\n"
        "  fix: enable a precision that the device has, or none: fp32 runs everywhere"
    )
    assert not comm.is_initialized()


@pytest.mark.parametrize("section", CASES)
def test_a_cpu_can(section):
    engine = start(section, **CASES[section][0])
    x = torch.ones(1, 2, dtype=engine.module.weight.dtype)
    loss = engine(x).float().sum() / 4  # the gradient of the output, 2**16 / 4, fits fp16
    engine.backward(loss)
    engine.step()
    assert engine.was_step_applied()
    engine.destroy()
    comm.destroy_process_group()


def test_fp32_asks_the_device_nothing(monkeypatch):
    class Asleep(CpuAccelerator):
        def supported_dtypes(self):
            raise AssertionError("woken up")

    monkeypatch.setattr(build, "get_accelerator", Asleep)
    ds_core.initialize(model=torch.nn.Linear(2, 1), config=CONFIG)[0].destroy()
    comm.destroy_process_group()
