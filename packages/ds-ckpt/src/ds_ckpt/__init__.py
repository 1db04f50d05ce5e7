"""ds-ckpt: The ckpt part of the ds training runtime.

>>> import ds_ckpt
>>> ds_ckpt.__version__
'0.1.0'
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__: list[str] = []
