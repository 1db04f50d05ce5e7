"""ds-ckpt: checkpoints that load at any world size: sharded, checksummed, nothing pickled, and one reader for all.

Names are resolved on first use (PEP 562), so ``import ds_ckpt`` needs nothing but itself.

>>> import ds_ckpt
>>> ds_ckpt.__version__
'0.1.0'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_ckpt.reader import Checkpoint, open

__version__ = "0.1.0"

__all__ = ["Checkpoint", "open"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ds_ckpt import reader

    return getattr(reader, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
