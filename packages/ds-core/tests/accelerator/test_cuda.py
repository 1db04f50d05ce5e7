"""The CUDA accelerator: names anywhere, devices where there are any."""

from __future__ import annotations

import pytest
import torch

from ds_core.accelerator.cuda import CudaAccelerator


def test_names_need_no_device() -> None:
    accelerator = CudaAccelerator()
    assert accelerator.device_name() == "cuda"
    assert accelerator.device_name(1) == "cuda:1"
    assert accelerator.device(1) == torch.device("cuda", 1)
    assert accelerator.communication_backend_name() in ("nccl", "gloo")
    assert accelerator.device_count() == torch.cuda.device_count()
    assert accelerator.is_available() == (torch.cuda.device_count() > 0)


@pytest.mark.parametrize(
    ("capability", "native_bf16", "expected"),
    [
        ((6, 1), False, {torch.float32, torch.float64}),
        ((7, 5), False, {torch.float32, torch.float64, torch.float16}),
        ((9, 0), True, {torch.float32, torch.float64, torch.float16, torch.bfloat16}),
    ],
)
def test_dtypes_follow_the_device(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], native_bf16: bool, expected: set[torch.dtype]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native_bf16)
    assert set(CudaAccelerator().supported_dtypes()) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_the_current_device() -> None:
    accelerator = CudaAccelerator()
    accelerator.set_device(0)
    assert accelerator.current_device_name() == "cuda:0"
    accelerator.reset_peak_memory_stats()
    before = accelerator.memory_allocated()
    held = torch.ones(2**20, dtype=torch.uint8, device=accelerator.device())
    accelerator.synchronize()
    assert accelerator.memory_allocated() - before == held.numel()
    del held
    assert accelerator.memory_allocated() == before
    assert accelerator.max_memory_allocated() == before + 2**20 < accelerator.total_memory()
