"""Pins what users may rely on: the public names, the modules that have them, and the entry points."""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import subprocess
import sys

import pytest

import ds_fp16

NAMES = {
    "precision": ["Bf16", "Fp16", "TorchAutocast"],
    "optimizers": ["BF16_Optimizer", "FP16_Optimizer", "FP16_UnfusedOptimizer"],
    "loss_scaler": [
        "CONSECUTIVE_HYSTERESIS",
        "CreateLossScaler",
        "DELAYED_SHIFT",
        "DynamicLossScaler",
        "INITIAL_LOSS_SCALE",
        "LOSS_SCALE_PROFILE_DEFAULTS",
        "LossScaleConfig",
        "LossScaleProfile",
        "LossScaleProfileDefaults",
        "LossScaler",
        "LossScalerBase",
        "MIN_LOSS_SCALE",
        "SCALE_WINDOW",
        "get_loss_scaler",
        "to_python_float",
    ],
    "fp16_utils": [
        "BN_convert_float",
        "clip_grad_norm",
        "convert_module",
        "convert_network",
        "master_params_to_model_params",
        "model_grads_to_master_grads",
        "network_to_half",
        "prep_param_lists",
        "tofp16",
    ],
    "norms": [
        "CheckOverflow",
        "DummyOptim",
        "clip_grad_norm_",
        "clip_tensors_by_global_norm",
        "get_flattened_grad_norm",
        "get_global_norm",
        "get_global_norm_of_tensors",
        "get_grad_zeros",
        "get_norm_with_moe_layers",
        "get_weight_norm",
        "is_model_parallel_parameter",
    ],
    "autocast": [
        "LOWER_PRECISION_SAFE_MODULES",
        "PARAM_COMM_DTYPE_ATTR_NAME",
        "autocast_if_enabled",
        "get_all_comm_dtypes",
        "get_autocast_dtype",
        "get_comm_dtype",
        "get_default_autocast_lower_precision_modules",
        "has_comm_dtype",
        "init_autocast_params",
        "is_autocast_initialized",
        "safe_module_classes",
        "sort_dtypes",
    ],
}
ENTRY_POINTS = {
    ("ds_core.precision", "fp16", "ds_fp16.precision:Fp16"),
    ("ds_core.precision", "bf16", "ds_fp16.precision:Bf16"),
    ("ds_core.precision", "torch_autocast", "ds_fp16.precision:TorchAutocast"),
}


def test_public_names() -> None:
    assert ds_fp16.__all__ == sorted(name for names in NAMES.values() for name in names)
    assert set(ds_fp16.__all__) <= set(dir(ds_fp16))


@pytest.mark.parametrize("module", NAMES)
def test_a_name_of_the_package_is_that_of_its_module(module: str) -> None:
    found = importlib.import_module(f"ds_fp16.{module}")
    for name in NAMES[module]:
        assert name in found.__all__
        assert getattr(ds_fp16, name) is getattr(found, name)


def test_what_it_does_not_have() -> None:
    with pytest.raises(AttributeError, match="module 'ds_fp16' has no attribute 'FP8_Optimizer'"):
        ds_fp16.FP8_Optimizer  # noqa: B018


def test_the_package_alone_loads_no_torch() -> None:
    code = "import sys, ds_fp16; assert 'torch' not in sys.modules; ds_fp16.Fp16; assert 'torch' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def test_version_is_that_of_the_distribution() -> None:
    assert ds_fp16.__version__ == metadata.version("ds-fp16")


def test_entry_points() -> None:
    found = {(entry.group, entry.name, entry.value) for entry in metadata.distribution("ds-fp16").entry_points}
    assert found == ENTRY_POINTS


def test_it_is_made_for_the_installed_core() -> None:
    import ds_core

    assert ds_core.__version__.startswith("0.1.")
