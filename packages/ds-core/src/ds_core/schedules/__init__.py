"""Learning-rate schedules, and the word in ``scheduler.type`` -> a schedule.

Importing this package loads no torch; the schedules do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ds_core.schedules._build import build_schedule

if TYPE_CHECKING:
    from ds_core.schedules._base import NotSteppedError
    from ds_core.schedules.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = ["NotSteppedError", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR", "build_schedule"]

_HOME = {
    "NotSteppedError": "ds_core.schedules._base",
    "WarmupCosineLR": "ds_core.schedules.warmup",
    "WarmupDecayLR": "ds_core.schedules.warmup",
    "WarmupLR": "ds_core.schedules.warmup",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ds_core.schedules' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
