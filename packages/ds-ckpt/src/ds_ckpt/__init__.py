"""ds-ckpt: checkpoints that load at any world size: sharded, checksummed, nothing pickled, and one reader for all.

>>> import ds_ckpt
>>> ds_ckpt.__version__
'0.1.0'
"""

from __future__ import annotations

from ds_ckpt.reader import Checkpoint, open

__version__ = "0.1.0"

__all__ = ["Checkpoint", "open"]
