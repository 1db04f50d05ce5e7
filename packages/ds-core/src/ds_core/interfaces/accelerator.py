"""Seam ``accelerator``: facts about a kind of device. Nothing here touches a device until it is asked.

Contract: ``ds_core.testing.accelerator``. The active one is ``ds_core.accelerator.get_accelerator()``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Accelerator"]


class Accelerator(ABC):
    """Device facts, under DeepSpeed's method names (spec/core.md section 7)."""

    @abstractmethod
    def is_available(self) -> bool:
        """Return whether at least one device can be used by this process. The only call allowed when it is False."""

    @abstractmethod
    def device_name(self, device_index: int | None = None) -> str:
        """Return the kind (``"cuda"``), or with an index the device (``"cuda:0"``)."""

    @abstractmethod
    def device(self, device_index: int | None = None) -> torch.device: ...

    @abstractmethod
    def device_count(self) -> int: ...

    @abstractmethod
    def set_device(self, device_index: int) -> None: ...

    @abstractmethod
    def current_device(self) -> int: ...

    def current_device_name(self) -> str:
        """Return the device this process works on, such as ``"cuda:0"``; every CPU is ``"cpu"``."""
        return self.device_name(self.current_device())

    @abstractmethod
    def synchronize(self, device_index: int | None = None) -> None: ...

    @abstractmethod
    def communication_backend_name(self) -> str:
        """Return torch.distributed's backend for its tensors."""

    @abstractmethod
    def supported_dtypes(self) -> list[torch.dtype]:
        """Return the floating-point dtypes a model can be trained in."""

    def is_bf16_supported(self) -> bool:
        import torch

        return torch.bfloat16 in self.supported_dtypes()

    def is_fp16_supported(self) -> bool:
        import torch

        return torch.float16 in self.supported_dtypes()

    @abstractmethod
    def memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes of live tensors on the device; for a CPU the resident bytes of the process."""

    @abstractmethod
    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """The highest :meth:`memory_allocated` since :meth:`reset_peak_memory_stats`."""

    @abstractmethod
    def reset_peak_memory_stats(self, device_index: int | None = None) -> None: ...

    @abstractmethod
    def total_memory(self, device_index: int | None = None) -> int:
        """Bytes of memory of the device."""
