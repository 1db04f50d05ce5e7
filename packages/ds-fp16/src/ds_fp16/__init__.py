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
    "FP16_Optimizer": "optimizers",
    "FP16_UnfusedOptimizer": "optimizers",
    "BF16_Optimizer": "optimizers",
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
    "network_to_half": "fp16_utils",
    "convert_module": "fp16_utils",
    "convert_network": "fp16_utils",
    "tofp16": "fp16_utils",
    "BN_convert_float": "fp16_utils",
    "prep_param_lists": "fp16_utils",
    "model_grads_to_master_grads": "fp16_utils",
    "master_params_to_model_params": "fp16_utils",
    "clip_grad_norm": "fp16_utils",
    "CheckOverflow": "norms",
    "DummyOptim": "norms",
    "clip_grad_norm_": "norms",
    "clip_tensors_by_global_norm": "norms",
    "get_flattened_grad_norm": "norms",
    "get_global_norm": "norms",
    "get_global_norm_of_tensors": "norms",
    "get_grad_zeros": "norms",
    "get_norm_with_moe_layers": "norms",
    "get_weight_norm": "norms",
    "is_model_parallel_parameter": "norms",
    "LOWER_PRECISION_SAFE_MODULES": "autocast",
    "PARAM_COMM_DTYPE_ATTR_NAME": "autocast",
    "autocast_if_enabled": "autocast",
    "get_all_comm_dtypes": "autocast",
    "get_autocast_dtype": "autocast",
    "get_comm_dtype": "autocast",
    "get_default_autocast_lower_precision_modules": "autocast",
    "has_comm_dtype": "autocast",
    "init_autocast_params": "autocast",
    "is_autocast_initialized": "autocast",
    "safe_module_classes": "autocast",
    "sort_dtypes": "autocast",
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
