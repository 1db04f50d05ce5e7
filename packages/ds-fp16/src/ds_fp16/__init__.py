"""ds-fp16: mixed precision for the ds training runtime: fp16 with loss scaling, bf16, torch autocast.

Names are resolved on first use (PEP 562), so ``import ds_fp16`` loads no torch.

>>> import ds_fp16
>>> ds_fp16.__version__
'0.1.0'
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HERE = {
    "Fp16": "precision",
    "Bf16": "precision",
    "TorchAutocast": "precision",
    "INITIAL_LOSS_SCALE": "loss_scaler",
    "SCALE_WINDOW": "loss_scaler",
    "DELAYED_SHIFT": "loss_scaler",
    "CONSECUTIVE_HYSTERESIS": "loss_scaler",
    "MIN_LOSS_SCALE": "loss_scaler",
    "to_python_float": "loss_scaler",
    "LossScalerBase": "loss_scaler",
    "LossScaler": "loss_scaler",
    "DynamicLossScaler": "loss_scaler",
    "CreateLossScaler": "loss_scaler",
    "get_loss_scaler": "loss_scaler",
    "LossScaleConfig": "loss_scaler",
    "LossScaleProfile": "loss_scaler",
    "LossScaleProfileDefaults": "loss_scaler",
    "LOSS_SCALE_PROFILE_DEFAULTS": "loss_scaler",
}
"""Public name -> the module here that has it."""

__all__ = sorted(_HERE)


def __getattr__(name: str) -> Any:
    if name not in _HERE:
        raise AttributeError(f"module 'ds_fp16' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ds_fp16.{_HERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
