"""The CPU accelerator."""

from __future__ import annotations

import mmap
from pathlib import Path

import psutil
import pytest
import torch

from ds_core.accelerator import cpu
from ds_core.accelerator.cpu import CpuAccelerator

MIB = 2**20


@pytest.fixture
def accelerator() -> CpuAccelerator:
    return CpuAccelerator()


def test_every_index_is_the_one_device(accelerator: CpuAccelerator) -> None:
    accelerator.set_device(3)
    accelerator.synchronize()
    assert accelerator.is_available()
    assert accelerator.device_count() == 1
    assert accelerator.current_device() == 0
    assert accelerator.device_name() == accelerator.device_name(3) == accelerator.current_device_name() == "cpu"
    assert accelerator.device(3) == torch.device("cpu")
    assert accelerator.communication_backend_name() == "gloo"


def test_every_supported_dtype_trains(accelerator: CpuAccelerator) -> None:
    assert accelerator.is_bf16_supported()
    assert accelerator.is_fp16_supported()
    assert set(accelerator.supported_dtypes()) == {torch.float32, torch.bfloat16, torch.float16, torch.float64}
    for dtype in accelerator.supported_dtypes():
        layer = torch.nn.Linear(4, 4, dtype=dtype)
        layer(torch.ones(2, 4, dtype=dtype)).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == dtype


def _touch_and_free(size: int) -> None:
    # Pages of the system's own: an allocator may give out what it has kept, which is resident already.
    with mmap.mmap(-1, size) as pages:
        pages[:: mmap.PAGESIZE] = bytes(len(range(0, size, mmap.PAGESIZE)))


def test_memory_is_what_is_resident(accelerator: CpuAccelerator) -> None:
    before = accelerator.memory_allocated()
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    assert accelerator.memory_allocated() - before > 48 * MIB
    del held
    assert accelerator.total_memory() == psutil.virtual_memory().total


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can forget a peak")
def test_the_peak_is_since_the_reset(accelerator: CpuAccelerator) -> None:
    _touch_and_free(64 * MIB)
    accelerator.reset_peak_memory_stats()
    base = accelerator.max_memory_allocated()
    assert base < accelerator.memory_allocated() + 16 * MIB
    _touch_and_free(32 * MIB)
    assert 24 * MIB < accelerator.max_memory_allocated() - base < 56 * MIB


def test_a_peak_that_the_system_keeps_is_not_reported_again(
    accelerator: CpuAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = accelerator.memory_allocated() + 100 * MIB
    monkeypatch.setattr(cpu, "_forget_peak", lambda: False)
    monkeypatch.setattr(cpu, "_peak_resident_bytes", lambda: peak)
    assert accelerator.max_memory_allocated() == peak
    accelerator.reset_peak_memory_stats()
    assert accelerator.max_memory_allocated() < peak
    monkeypatch.setattr(cpu, "_peak_resident_bytes", lambda: peak + MIB)
    assert accelerator.max_memory_allocated() == peak + MIB
