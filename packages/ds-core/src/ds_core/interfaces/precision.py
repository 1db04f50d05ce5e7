"""Seam ``precision``: which dtype each thing has, how the loss is scaled, and when a step is skipped.

A precision is data plus a scaler; the partition executes the plan. The entry name is the section users enable
(``fp16``, ``bf16``, ``torch_autocast``), or ``precision.type`` for one that is not DeepSpeed's.
Contract: ``ds_core.testing.precision``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from ds_core.config import Config as Configuration
    from ds_core.config import Section

__all__ = ["LossScaler", "Precision", "PrecisionPlan"]


@dataclass(frozen=True)
class PrecisionPlan:
    """The dtype of everything in a step; None means "as the parameter is", or for masters and autocast "none"."""

    stored: torch.dtype | None = None
    """Model parameters between steps."""
    compute: torch.dtype | None = None
    """Matrix products of forward and backward."""
    gradient: torch.dtype | None = None
    """What autograd leaves behind."""
    reduce: torch.dtype | None = None
    """Gradients inside a collective."""
    accumulate: torch.dtype | None = None
    """Gradients summed over micro-batches."""
    master: torch.dtype | None = None
    """The optimizer's own copy of the weights; None: it updates the stored ones."""
    input_cast: torch.dtype | None = None
    """Floating-point inputs of forward are cast to this; None: left alone."""
    autocast: torch.dtype | None = None
    """Forward runs under ``torch.autocast`` with this dtype; None: it does not."""


@runtime_checkable
class LossScaler(Protocol):
    """The factor the loss is multiplied by, so that small gradients survive."""

    @property
    def scale(self) -> float:
        """The factor of the coming backward; 1.0 where nothing is scaled."""

    def update(self, *, overflowed: bool) -> None:
        """Learn how a step ended. Called once per optimizer step, with the same value on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Return JSON from which :meth:`load_state_dict` continues exactly."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Precision(ABC):
    """One precision, built once per engine. All ranks build the same."""

    Config: ClassVar[type[Section] | None] = None
    """Options of its own, ``precision.<name>``; DeepSpeed's sections are in ``ds_core.config`` already."""

    def __init__(self, config: Configuration) -> None:
        """Raise ``ConfigError`` for what this precision cannot do. Called before a process group is touched."""
        self.config = config

    @property
    @abstractmethod
    def plan(self) -> PrecisionPlan: ...

    @property
    @abstractmethod
    def scaler(self) -> LossScaler: ...

    @abstractmethod
    def overflowed(self, norm: float) -> bool:
        """Return whether the step must be skipped.

        Args:
            norm: global L2 norm of the still scaled gradients, equal on every rank, inf or NaN where one of them is.
        """

    def after_step(self, *, skipped: bool) -> None:
        """Called on every rank at the end of each optimizer step."""
        self.scaler.update(overflowed=skipped)
