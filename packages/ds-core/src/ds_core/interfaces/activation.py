"""Seam ``activation``: recompute, offload or partition what backward needs. The built-in is torch's own recomputation.

Contract: ``ds_core.testing.activation``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ActivationCheckpointing"]


class ActivationCheckpointing(ABC):
    """One way to run a function without keeping its inner activations."""

    @abstractmethod
    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return ``function(*args, **kwargs)``, its inner activations computed again in backward.

        Outputs and gradients equal those without it, random layers included.
        """
