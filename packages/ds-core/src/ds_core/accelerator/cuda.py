"""CUDA devices (and ROCm's, which torch calls by the same name)."""

from __future__ import annotations

import sys

import torch

from ds_core.interfaces.accelerator import Accelerator

__all__ = ["CudaAccelerator"]


class CudaAccelerator(Accelerator):
    """The GPUs that torch.cuda sees."""

    def is_available(self) -> bool:
        # Counting goes through NVML, which starts no CUDA context: a process may still fork afterwards.
        return torch.cuda.device_count() > 0

    def device_name(self, device_index: int | None = None) -> str:
        return "cuda" if device_index is None else f"cuda:{device_index}"

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device(self.device_name(device_index))

    def device_count(self) -> int:
        return torch.cuda.device_count()

    def set_device(self, device_index: int) -> None:
        torch.cuda.set_device(device_index)

    def current_device(self) -> int:
        return torch.cuda.current_device()

    def synchronize(self, device_index: int | None = None) -> None:
        torch.cuda.synchronize(device_index)

    def communication_backend_name(self) -> str:
        return "gloo" if sys.platform == "win32" else "nccl"

    def supported_dtypes(self) -> list[torch.dtype]:
        dtypes = [torch.float32, torch.float64]
        # Emulated bfloat16 would be offered on any GPU, at a fraction of fp32's speed.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            dtypes.append(torch.bfloat16)
        # Below 7.0 there are no tensor cores, and 6.1 computes fp16 at 1/64 of fp32's speed.
        if torch.cuda.get_device_capability() >= (7, 0):
            dtypes.append(torch.float16)
        return dtypes

    def memory_allocated(self, device_index: int | None = None) -> int:
        return torch.cuda.memory_allocated(device_index)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return torch.cuda.max_memory_allocated(device_index)

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        torch.cuda.reset_peak_memory_stats(device_index)

    def total_memory(self, device_index: int | None = None) -> int:
        index = self.current_device() if device_index is None else device_index
        return int(torch.cuda.get_device_properties(index).total_memory)
