"""ds-zero: ZeRO: optimizer state and gradients divided over the ranks.

>>> import ds_zero
>>> ds_zero.__version__
'0.1.0'
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__: list[str] = []
