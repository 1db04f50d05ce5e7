"""The random generators of one rank: torch's (CPU and device), Python's, NumPy's where it is in use."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

__all__ = ["capture_rng", "restore_rng"]


def capture_rng(device: torch.device) -> dict[str, Any]:
    """Return the state of every global generator; values are tensors, tuples and numbers."""
    found: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type != "cpu":
        found["device"] = torch.get_device_module(device).get_rng_state(device)
    if "numpy" in sys.modules:
        name, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        found["numpy"] = (str(name), keys.tolist(), int(position), int(has_gauss), float(cached))
    return found


def restore_rng(found: dict[str, Any], device: torch.device) -> None:
    """Set every generator that ``found`` has and this process uses."""
    torch.set_rng_state(found["torch"])
    random.setstate(found["python"])
    if "device" in found and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(found["device"], device)
    if "numpy" in found:
        import numpy as np

        name, keys, position, has_gauss, cached = found["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
