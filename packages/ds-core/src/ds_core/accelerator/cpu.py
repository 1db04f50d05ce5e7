"""The CPU as an accelerator: one device, whatever the number of cores or processes."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch

from ds_core.interfaces.accelerator import Accelerator

__all__ = ["CpuAccelerator"]


class CpuAccelerator(Accelerator):
    """The host. Its memory figures are those of the process, in resident bytes.

    Every index names the same device, so a local rank may be given where a device index is asked.
    """

    def __init__(self) -> None:
        self._peak_not_forgotten = 0

    def is_available(self) -> bool:
        return True

    def device_name(self, device_index: int | None = None) -> str:
        return "cpu"

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        """Do nothing: there is one CPU."""

    def current_device(self) -> int:
        return 0

    def synchronize(self, device_index: int | None = None) -> None:
        """Do nothing: a CPU call has ended when it returns."""

    def communication_backend_name(self) -> str:
        return "gloo"

    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16, torch.float64]

    def memory_allocated(self, device_index: int | None = None) -> int:
        # Asked anew each time: a handle kept over a fork would answer for the parent.
        return int(psutil.Process().memory_info().rss)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """The peak of the resident bytes since :meth:`reset_peak_memory_stats`, or of the process without one.

        Linux can forget an older peak. Elsewhere, and where ``/proc`` is read-only, a peak below the one at the reset
        is not known: the answer is then what is resident now, a lower bound.
        """
        peak = _peak_resident_bytes()
        return max(peak if peak > self._peak_not_forgotten else 0, self.memory_allocated())

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        self._peak_not_forgotten = 0 if _forget_peak() else _peak_resident_bytes()

    def total_memory(self, device_index: int | None = None) -> int:
        return int(psutil.virtual_memory().total)


def _peak_resident_bytes() -> int:
    if sys.platform == "linux":
        # Not getrusage: it also counts what this process was before exec.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0  # a sandbox that hides the line; the caller falls back to what is resident now
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _forget_peak() -> bool:
    """Reset the peak of this process where the system allows it (Linux, proc(5), ``clear_refs``)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False  # no such file, or not writable: the caller remembers the old peak instead
    return True
