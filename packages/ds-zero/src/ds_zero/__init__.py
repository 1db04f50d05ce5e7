"""ds-zero: ZeRO stages 1 and 2: optimizer state and gradients divided over the ranks, weights whole on each.

``"zero_optimization": {"stage": 2}`` in the configuration is all it takes. ``partition`` is what the engine talks to;
``weights`` and ``gradients`` hold the two kinds of tensors, by the arithmetic of ``layout``, and ``collectives`` moves
them; ``volume`` and ``estimates`` predict traffic and memory; ``faces`` is DeepSpeed's surface of the optimizer.

Names are resolved on first use (PEP 562), so ``import ds_zero`` loads no torch.

>>> import ds_zero
>>> ds_zero.__version__
'0.1.0'
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HERE = {
    "ZeroStage1": "partition",
    "ZeroStage2": "partition",
    "DeepSpeedZeroOptimizer": "faces",
    "estimate_zero2_model_states_mem_needs": "estimates",
    "estimate_zero2_model_states_mem_needs_all_cold": "estimates",
    "estimate_zero2_model_states_mem_needs_all_live": "estimates",
    "estimate_zero3_model_states_mem_needs": "estimates",
    "estimate_zero3_model_states_mem_needs_all_cold": "estimates",
    "estimate_zero3_model_states_mem_needs_all_live": "estimates",
}
"""Public name -> the module here that has it."""
_OF_STAGE_3 = (
    *("Init", "MiCS_Init", "GatheredParameters", "register_external_parameter", "unregister_external_parameter"),
    *("TiledLinear", "TiledLinearReturnBias", "unwrap_model_for_generation", "ZeroParamType", "ZeroParamStatus"),
)
"""Names of ``deepspeed.zero`` that no release has yet."""

__all__ = sorted(_HERE)


def __getattr__(name: str) -> Any:
    if name in _OF_STAGE_3:
        from ds_core.errors import NotBuiltError

        raise NotBuiltError(
            f"ds_zero.{name} is not built yet: it belongs to stage 3",
            fix="leave it out: at stages 1 and 2 parameters are whole on every rank",
        )
    if name not in _HERE:
        raise AttributeError(f"module 'ds_zero' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ds_zero.{_HERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
