"""What DeepSpeed has in ``deepspeed.utils``: the tensors behind a parameter, the logger, ``RepeatingLoader``.

Names are resolved on first use, so importing this loads no torch.

>>> import torch, ds_core
>>> from ds_core.utils import safe_get_full_fp32_param
>>> engine, _, _, _ = ds_core.initialize(
...     model=torch.nn.Linear(2, 1, bias=False),
...     config={"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}},
... )
>>> safe_get_full_fp32_param(engine.module.weight).shape
torch.Size([1, 2])
"""

from __future__ import annotations

import importlib
from typing import Any

_FRAGMENTS = (
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
)
_HERE = {
    "RepeatingLoader": "ds_core.data",
    "log_dist": "ds_core.log",
    "logger": "ds_core.log",
    **dict.fromkeys(_FRAGMENTS, "ds_core.engine.fragments"),
}
_LATER = {
    "OnDevice": "ds-core",
    "get_numactl_cmd": "ds-launcher",
    "get_z3_leaf_modules": "ds-zero",
    "groups": "ds-core",
    "instrument_w_nvtx": "ds-core",
    "set_z3_leaf_module": "ds-zero",
    "set_z3_leaf_modules": "ds-zero",
    "set_z3_leaf_modules_by_name": "ds-zero",
    "set_z3_leaf_modules_by_suffix": "ds-zero",
    "unset_z3_leaf_modules": "ds-zero",
    "z3_leaf_module": "ds-zero",
    "z3_leaf_parameter": "ds-zero",
    "zero_to_fp32": "ds-compat",
}
"""Names of DeepSpeed's that come with a later release of the named package."""

__all__ = sorted(_HERE)


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from ds_core.errors import NotBuiltError

        raise NotBuiltError(
            f"ds_core.utils.{name} is not built yet: it comes with a later release of {_LATER[name]}",
            fix=f"pip install --upgrade {_LATER[name]}",
        )
    if name not in _HERE:
        raise AttributeError(f"module 'ds_core.utils' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HERE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
