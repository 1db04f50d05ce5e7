"""The built-in precision: everything stays as the parameters are, nothing is scaled, nothing is skipped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ds_core.interfaces.precision import LossScaler, Precision, PrecisionPlan

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Fp32", "NoScaling"]


class NoScaling(LossScaler):
    """A scale of 1 that never changes."""

    scale = 1.0

    def update(self, *, overflowed: bool) -> None:
        """There is nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to restore."""


class Fp32(Precision):
    """Parameters, gradients and optimizer state as the model was given, usually fp32.

    A step whose gradients are inf or NaN is applied, as plain PyTorch does.
    """

    plan = PrecisionPlan()
    scaler = NoScaling()

    def overflowed(self, norm: float) -> bool:
        return False
