"""Training data: this rank's batches, with a position that can be saved and loaded.

Importing this package loads no torch; its classes do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_core.data.loader import DeepSpeedDataLoader
    from ds_core.data.repeating import RepeatingLoader
    from ds_core.data.sampler import EpochSampler

__all__ = ["DeepSpeedDataLoader", "EpochSampler", "RepeatingLoader"]

_HOME = {
    "DeepSpeedDataLoader": "ds_core.data.loader",
    "EpochSampler": "ds_core.data.sampler",
    "RepeatingLoader": "ds_core.data.repeating",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ds_core.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
