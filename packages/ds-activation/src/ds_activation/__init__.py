"""ds-activation: activation memory under control: recompute, divide or offload what backward needs.

``ds_core.checkpointing`` has these names once this package is installed. ``call`` is one checkpointed call, with what
``settings`` says of its inputs, which ``kept`` divides and moves; ``rng`` keeps random states by name.

Names are resolved on first use (PEP 562), so ``import ds_activation`` loads no torch. Names in capitals, ``mpu`` and
``mp_rank`` are read from the settings in force each time.

>>> import ds_activation
>>> ds_activation.__version__
'0.1.0'
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HERE = {
    "CheckpointFunction": "internals:CheckpointFunction",
    "CudaRNGStatesTracker": "rng:CudaRNGStatesTracker",
    "checkpoint": "call:shaped_checkpoint",
    "configure": "settings:configure",
    "detach_variable": "internals:detach_variable",
    "extract_tensors": "internals:extract_tensors",
    "gather_partitioned_activations": "internals:gather_partitioned_activations",
    "get_cuda_rng_tracker": "rng:get_cuda_rng_tracker",
    "get_partition_size": "internals:get_partition_size",
    "get_partition_start": "internals:get_partition_start",
    "is_activation_to_checkpoint": "internals:is_activation_to_checkpoint",
    "is_configured": "settings:is_configured",
    "merge_tensors": "internals:merge_tensors",
    "model_parallel_cuda_manual_seed": "seeding:model_parallel_cuda_manual_seed",
    "model_parallel_reconfigure_tp_seed": "seeding:model_parallel_reconfigure_tp_seed",
    "non_reentrant_checkpoint": "call:non_reentrant_checkpoint",
    "partition_activations": "internals:partition_activations",
    "partition_activations_in_checkpoint": "settings:partition_activations_in_checkpoint",
    "reset": "settings:reset",
    "set_num_layers": "settings:set_num_layers",
}
"""Public name -> the module here that has it, and its name there."""
_PRIVATE = {"_MODEL_PARALLEL_RNG_TRACKER_NAME": "rng:MODEL_PARALLEL", "_set_cuda_rng_state": "rng:set_device_state"}
"""The same for names that other projects import all the same."""
_FLAGS = {
    "PARTITION_ACTIVATIONS": "partition_activations",
    "CPU_CHECKPOINT": "cpu_checkpointing",
    "CONTIGUOUS_CHECKPOINTING": "contiguous_memory_optimization",
    "SYNCHRONIZE": "synchronize_checkpoint_boundary",
    "PROFILE_TIME": "profile",
    "num_layers": "number_checkpoints",
    "mpu": "mpu",
}
"""DeepSpeed's name -> the field of the settings in force."""
_PLACES = {"mp_rank": "rank", "mp_size": "size", "mp_group": "group"}
"""DeepSpeed's name -> what the mpu says."""

__all__ = sorted(_HERE)


def __getattr__(name: str) -> Any:
    if name in _FLAGS or name in _PLACES or name == "deepspeed_checkpointing_enabled":
        return _in_force(name)
    found = _HERE.get(name) or _PRIVATE.get(name)
    if found is None:
        raise AttributeError(f"module 'ds_activation' has no attribute {name!r}")
    module, there = found.split(":")
    value = getattr(importlib.import_module(f"ds_activation.{module}"), there)
    globals()[name] = value
    return value


def _in_force(name: str) -> Any:
    from ds_activation import model_parallel, settings

    if name == "deepspeed_checkpointing_enabled":
        return settings.is_configured()
    if name in _FLAGS:
        return getattr(settings.current(), _FLAGS[name])
    return getattr(model_parallel.place_in(settings.current().mpu), _PLACES[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
