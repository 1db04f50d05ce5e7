"""A precision of our own: fp32 with a loss scale that never changes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from acme_ds import journal
from ds_core.config import Section
from ds_core.interfaces.precision import LossScaler, Precision, PrecisionPlan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ds_core.config import Config


class ScaledOptions(Section):
    """Options of ``acme_scaled``, ``precision.acme_scaled``."""

    scale: float = 8.0
    """What the loss is multiplied by; a power of two leaves every gradient exact."""


class ConstantScale(LossScaler):
    """One factor for the whole run."""

    dynamic = False

    def __init__(self, scale: float) -> None:
        self._scale = scale

    @property
    def scale(self) -> float:
        return self._scale

    def update(self, *, overflowed: bool) -> None:
        journal.entries.append(f"precision {'skipped' if overflowed else 'kept'} at {self._scale}")

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self._scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._scale = float(state["scale"])


class ScaledPrecision(Precision):
    """Skips a step whose gradients are not finite."""

    Config = ScaledOptions

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        options = config.options("precision", "acme_scaled", ScaledOptions)
        self._scaler = ConstantScale(options.scale)

    @property
    def plan(self) -> PrecisionPlan:
        return PrecisionPlan()

    @property
    def scaler(self) -> LossScaler:
        return self._scaler

    def overflowed(self, norm: float) -> bool:
        return not math.isfinite(norm)
