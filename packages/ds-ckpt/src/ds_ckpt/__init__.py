"""ds-ckpt: checkpoints that load at any world size: sharded, checksummed, nothing pickled, and one reader for all.

Names are resolved on first use (PEP 562), so ``import ds_ckpt`` needs nothing but itself.

>>> import ds_ckpt
>>> ds_ckpt.__version__
'0.1.0'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_ckpt.exporting import export
    from ds_ckpt.reader import Checkpoint, open
    from ds_ckpt.zero_to_fp32 import (
        convert_zero_checkpoint_to_fp32_state_dict,
        get_fp32_state_dict_from_zero_checkpoint,
        load_state_dict_from_zero_checkpoint,
    )
    from ds_core.errors import CheckpointError

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "export",
    "get_fp32_state_dict_from_zero_checkpoint",
    "load_state_dict_from_zero_checkpoint",
    "open",
]

_MODULES = {
    "Checkpoint": "ds_ckpt.reader",
    "CheckpointError": "ds_core.errors",
    "export": "ds_ckpt.exporting",
    "open": "ds_ckpt.reader",
}
"""Name -> its module; the others are DeepSpeed's."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES.get(name, "ds_ckpt.zero_to_fp32")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
