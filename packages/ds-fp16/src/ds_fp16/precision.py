"""The precisions ``fp16``, ``bf16`` and ``torch_autocast``: plans, scalers, and when a step is skipped.

They execute nothing: a partition carries out the plan, the engine asks for the scale and the rule.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ds_core.interfaces.precision import Precision, PrecisionPlan
from ds_core.precision.plans import plan_for
from ds_fp16.autocast import safe_module_classes
from ds_fp16.loss_scaler import DynamicLossScaler, LossScaler, get_loss_scaler

if TYPE_CHECKING:
    from ds_core.config import Config
    from ds_core.interfaces.precision import LossScaler as AnyLossScaler

__all__ = ["Bf16", "Fp16", "TorchAutocast"]


class _LowPrecision(Precision):
    """What the three share: a plan and a scaler made once, and the rule about the norm."""

    def __init__(self, config: Config, plan: PrecisionPlan, scaler: AnyLossScaler, *, skips_overflow: bool) -> None:
        super().__init__(config)
        self._plan, self._scaler = plan, scaler
        self.skips_overflow = skips_overflow

    @property
    def plan(self) -> PrecisionPlan:
        return self._plan

    @property
    def scaler(self) -> AnyLossScaler:
        """The scaler in force; set it to scale by another one (``override_loss_scale`` of the optimizer's face)."""
        return self._scaler

    @scaler.setter
    def scaler(self, scaler: AnyLossScaler) -> None:
        self._scaler = scaler

    def overflowed(self, norm: float) -> bool:
        return self.skips_overflow and not math.isfinite(norm)


class Fp16(_LowPrecision):
    """fp16 weights with fp32 masters; the loss is scaled, and a step with inf or NaN is skipped.

    Also at a static scale (``fp16.loss_scale`` above 0), which then stays as it is.
    """

    def __init__(self, config: Config) -> None:
        plan = _stored_plan(config, torch.float16, casts_inputs=config.fp16.auto_cast)
        super().__init__(config, plan, get_loss_scaler(config), skips_overflow=True)

    def optimizer_face(self, engine: Any) -> Any:
        from ds_fp16.optimizers import fp16_face

        return fp16_face(engine)


class Bf16(_LowPrecision):
    """bf16 weights with fp32 masters, nothing scaled; ``bf16.check_grad_overflow`` says whether inf or NaN skips."""

    def __init__(self, config: Config) -> None:
        plan = _stored_plan(config, torch.bfloat16, casts_inputs=config.bf16.auto_cast)
        super().__init__(config, plan, LossScaler(1.0), skips_overflow=config.bf16.check_grad_overflow)

    def optimizer_face(self, engine: Any) -> Any:
        from ds_fp16.optimizers import bf16_face

        return bf16_face(engine)


class TorchAutocast(_LowPrecision):
    """Weights as they are, usually fp32; forward under ``torch.autocast``.

    Gradients of ``torch_autocast.lower_precision_safe_modules`` travel in the lower precision. To float16 the loss is
    scaled, with the numbers of ``torch.amp.GradScaler``.
    """

    def __init__(self, config: Config) -> None:
        section = config.torch_autocast
        dtype = _torch_dtype(section.dtype)
        plan = plan_for(
            config,
            autocast=dtype,
            reduce=dtype,
            reduce_in=safe_module_classes(section.lower_precision_safe_modules),
        )
        super().__init__(config, plan, _autocast_scaler(dtype), skips_overflow=True)


def _stored_plan(config: Config, dtype: torch.dtype, *, casts_inputs: bool) -> PrecisionPlan:
    """Return the plan of weights in ``dtype`` with fp32 masters, under autocast if that is enabled as well."""
    autocast = None
    if config.torch_autocast.enabled:
        # All gradients travel in the dtype of the weights, so the classes change nothing; a wrong name is still wrong.
        safe_module_classes(config.torch_autocast.lower_precision_safe_modules)
        autocast = _torch_dtype(config.torch_autocast.dtype)
    return plan_for(
        config,
        stored=dtype,
        master=torch.float32,
        reduce=dtype,
        input_cast=dtype if casts_inputs else None,
        autocast=autocast,
    )


def _autocast_scaler(dtype: torch.dtype) -> AnyLossScaler:
    if dtype != torch.float16:
        return LossScaler(1.0)
    return DynamicLossScaler(
        2.0**16, scale_window=2000, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False, dtype=dtype
    )


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
