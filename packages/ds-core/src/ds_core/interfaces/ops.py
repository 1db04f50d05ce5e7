"""Seam ``ops``: op name -> the best implementation for a device here, and why. An entry is a provider of several ops.

Contract: ``ds_core.testing.ops``; the choice is made by ``ds_core.ops.best``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["OpProvider", "Offer"]


@dataclass(frozen=True)
class Offer:
    """Whether a provider can run an op on a device now, and the reason either way, for people."""

    usable: bool
    why: str


class OpProvider(ABC):
    """A set of implementations of named ops."""

    priority: ClassVar[int] = 0
    """The usable provider of highest priority wins; torch's reference has 0."""

    @abstractmethod
    def ops(self) -> frozenset[str]:
        """Return the names of the ops it has at all. Loads no kernel compiler and touches no device."""

    @abstractmethod
    def offer(self, op: str, device: torch.device) -> Offer:
        """Say whether ``op`` can run on ``device``. Never raises for a missing compiler or device."""

    @abstractmethod
    def implementation(self, op: str) -> Callable[..., Any]:
        """Return the callable, equal in signature and (within its stated bound) in result to torch's reference."""
