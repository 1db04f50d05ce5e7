"""The built-in precision: everything stays as the parameters are, nothing is scaled, nothing is skipped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ds_core.interfaces.precision import LossScaler, Precision, PrecisionPlan
from ds_core.precision.plans import plan_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ds_core.config import Config as Configuration

__all__ = ["Fp32", "NoScaling"]


class NoScaling(LossScaler):
    """A scale of 1 that never changes."""

    scale = 1.0
    dynamic = False

    def update(self, *, overflowed: bool) -> None:
        """There is nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to restore."""


class Fp32(Precision):
    """Parameters, gradients and optimizer state as the model was given, usually fp32.

    ``data_types`` and ``communication_data_type`` hold here too; with ``data_types.param_dtype`` the parameters become
    fp32 whatever they were. A step whose gradients are inf or NaN is applied, as plain PyTorch does.
    """

    scaler = NoScaling()

    def __init__(self, config: Configuration) -> None:
        super().__init__(config)
        # The configuration is checked: here param_dtype can only be float32, or not be given.
        self._plan = plan_for(config, stored=torch.float32 if config.data_types.param_dtype else None)

    @property
    def plan(self) -> PrecisionPlan:
        return self._plan

    def overflowed(self, norm: float) -> bool:
        return False
