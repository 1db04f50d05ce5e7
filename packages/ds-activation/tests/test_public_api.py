"""Pins what users may rely on: the public names and the entry points."""

from __future__ import annotations

import importlib.metadata as metadata
import subprocess
import sys
from types import SimpleNamespace

import pytest

import ds_activation
import ds_core
from ds_activation import settings
from ds_core import checkpointing

PUBLIC = [
    "CheckpointFunction",
    "CudaRNGStatesTracker",
    "checkpoint",
    "configure",
    "detach_variable",
    "extract_tensors",
    "gather_partitioned_activations",
    "get_cuda_rng_tracker",
    "get_partition_size",
    "get_partition_start",
    "is_activation_to_checkpoint",
    "is_configured",
    "merge_tensors",
    "model_parallel_cuda_manual_seed",
    "model_parallel_reconfigure_tp_seed",
    "non_reentrant_checkpoint",
    "partition_activations",
    "partition_activations_in_checkpoint",
    "reset",
    "set_num_layers",
]


def test_public_names() -> None:
    assert ds_activation.__all__ == PUBLIC
    assert all(callable(getattr(ds_activation, name)) for name in PUBLIC)
    assert ds_activation._MODEL_PARALLEL_RNG_TRACKER_NAME == "model-parallel-rng"
    assert callable(ds_activation._set_cuda_rng_state)
    with pytest.raises(AttributeError, match="no attribute 'configur'"):
        _ = ds_activation.configur


def test_the_core_has_them() -> None:
    assert set(PUBLIC) >= checkpointing._THEIRS
    for name in checkpointing._THEIRS:
        assert getattr(checkpointing, name) is getattr(ds_activation, name)


def test_globals_are_those_of_the_settings_in_force() -> None:
    mpu = SimpleNamespace(
        get_model_parallel_rank=lambda: 1,
        get_model_parallel_world_size=lambda: 2,
        get_model_parallel_group=lambda: "group",
    )
    settings.forget()
    try:
        assert not ds_activation.deepspeed_checkpointing_enabled
        assert (ds_activation.mpu, ds_activation.mp_rank, ds_activation.mp_size) == (None, 0, 1)
        ds_activation.configure(mpu, None, True, True, 3, True, True, True)
        names = ("PARTITION_ACTIVATIONS", "CPU_CHECKPOINT", "CONTIGUOUS_CHECKPOINTING", "SYNCHRONIZE", "PROFILE_TIME")
        assert all(getattr(ds_activation, name) is True for name in names)
        assert ds_activation.num_layers == 3
        assert ds_activation.mpu is mpu
        assert (ds_activation.mp_rank, ds_activation.mp_size, ds_activation.mp_group) == (1, 2, "group")
        assert ds_activation.deepspeed_checkpointing_enabled
        with settings.in_force(settings.Settings()):
            assert ds_activation.PARTITION_ACTIVATIONS is False
    finally:
        settings.forget()
        ds_core.log.reset()


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, ds_activation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_version_is_that_of_the_distribution() -> None:
    assert ds_activation.__version__ == metadata.version("ds-activation")


def test_entry_points() -> None:
    found = {(entry.group, entry.name, entry.value) for entry in metadata.distribution("ds-activation").entry_points}
    assert ("ds_core.activation", "deepspeed", "ds_activation.attached:DeepSpeedActivation") in found


def test_it_is_made_for_the_installed_core() -> None:
    assert ds_core.__version__.startswith("0.1.")
