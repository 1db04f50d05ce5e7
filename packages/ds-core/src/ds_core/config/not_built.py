"""Sections of DeepSpeed's that no release of ours acts on yet: accepted while off, refused when on.

Building one deletes its row and adds its class to ``Config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_core.config.section import AUTO

__all__ = ["SECTIONS", "is_off"]

_CORE = "ds-core"
SECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "activation_checkpointing": ("ds-activation", {}),
    "aio": (
        "ds-zero",
        {"block_size": 1048576, "queue_depth": 8, "intra_op_parallelism": 1, "thread_count": 1, "overlap_events": True},
    ),
    "amp": (_CORE, {}),
    "autotuning": (_CORE, {}),
    "comet": (_CORE, {}),
    "comms_logger": (_CORE, {}),
    "compile": (_CORE, {}),
    "compression_training": (_CORE, {}),
    "curriculum_learning": (_CORE, {}),
    "data_efficiency": (_CORE, {"seed": 1234}),
    "datastates_ckpt": ("ds-ckpt", {}),
    "eigenvalue": (_CORE, {}),
    "elasticity": (_CORE, {}),
    "expert_parallel": ("ds-zero", {}),
    "flops_profiler": (_CORE, {}),
    "hybrid_engine": ("ds-inference", {}),
    "inference": ("ds-inference", {"tp_size": 1}),
    "nebula": ("ds-ckpt", {}),
    "pipeline": (
        "ds-pipe",
        {"stages": AUTO, "partition": "best", "pipe_partitioned": True, "grad_partitioned": True},
    ),
    "progressive_layer_drop": (_CORE, {}),
    "quantize_training": (_CORE, {}),
    "sparse_attention": ("ds-kernels", {}),
    "tensor_parallel": ("ds-inference", {"autotp_size": 1, "tp_size": 1, "tp_grain_size": 1}),
    "tensorboard": (_CORE, {}),
    "timers": (_CORE, {"enabled": True, "synchronized": True}),
    "wandb": (_CORE, {}),
    "weight_quantization": ("ds-inference", {}),
}
"""Section -> what brings it, and its defaults that are not false, null, zero or empty (nested keys flat)."""


def is_off(name: str, value: Any) -> bool:
    """Return whether section ``name`` asks for nothing: empty, ``enabled: false``, or all of it at its defaults.

    >>> is_off("tensorboard", {"enabled": False, "job_name": "mine"}), is_off("aio", {"queue_depth": 16})
    (True, False)
    """
    return _asks_nothing(value, SECTIONS[name][1])


def _asks_nothing(value: Any, defaults: Mapping[str, Any]) -> bool:
    if not isinstance(value, Mapping):
        return not value or value == AUTO
    if "enabled" in value and "enabled" not in defaults and (value["enabled"] is False or value["enabled"] == AUTO):
        return True
    return all(
        _is_default(item, defaults[key]) if key in defaults else _asks_nothing(item, defaults)
        for key, item in value.items()
    )


def _is_default(value: Any, default: Any) -> bool:
    # A number that is zero or null asks for nothing; a switch that is on by default and turned off does.
    return value in (default, AUTO) or (not value and default is not True)
