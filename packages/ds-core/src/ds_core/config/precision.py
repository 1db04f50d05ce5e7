"""Sections ``fp16``, ``bf16`` and ``torch_autocast``, each of which enables a plugin, and ``data_types``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ds_core.config.section import Count, DtypeName, Number, PositiveInt, Section, key

__all__ = ["Bf16Section", "DataTypesSection", "Fp16Section", "TorchAutocastSection"]


class Fp16Section(Section):
    """Half precision with loss scaling."""

    enabled: bool = False
    """Train in fp16."""
    auto_cast: bool = False
    """Cast positional floating-point inputs of forward to half."""
    loss_scale: Annotated[Number, Field(ge=0)] = 0.0
    """Constant factor of the loss; 0 finds it while training."""
    initial_scale_power: Count = 16
    """The found scale starts at two to this power."""
    loss_scale_window: PositiveInt = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: PositiveInt = 2
    """Overflows before the scale is halved."""
    consecutive_hysteresis: bool = False
    """A step without overflow gives the hysteresis back."""
    min_loss_scale: PositiveInt = 1
    """The found scale never falls below this."""
    fp16_master_weights_and_grads: bool = False
    """Master weights and gradients in fp16; ZeRO with CPU offload only."""


class Bf16Section(Section):
    """bfloat16 weights and fp32 masters; needs no loss scaling."""

    enabled: bool = False
    """Train in bf16."""
    immediate_grad_update: bool = False
    """Add each gradient to the fp32 one as soon as autograd made it."""
    check_grad_overflow: bool = key("check_grad_overflow", "check_overflow", default=True)
    """Skip a step whose gradients hold inf or NaN."""
    bf16_master_weights_and_grads: bool = False
    """Master weights and gradients in bf16; ZeRO only."""
    bf16_optimizer_states: bool = False
    """Optimizer state in bf16; needs ``bf16_master_weights_and_grads``."""


class TorchAutocastSection(Section):
    """fp32 weights, forward under ``torch.autocast``."""

    enabled: bool = False
    """Run forward under autocast."""
    dtype: DtypeName = "bfloat16"
    """The lower precision."""
    lower_precision_safe_modules: tuple[str, ...] = (
        "torch.nn.Linear",
        "torch.nn.Conv1d",
        "torch.nn.Conv2d",
        "torch.nn.Conv3d",
    )
    """Classes whose parameters are communicated in the lower precision, as dotted names."""


class DataTypesSection(Section):
    """Dtypes that hold whatever the precision is."""

    grad_accum_dtype: DtypeName | None = None
    """Dtype in which gradients are summed over micro-batches; null is that of the weights."""
    param_dtype: DtypeName | None = None
    """Dtype of the weights; ``fp16`` and ``bf16`` decide it, so anything but their choice is an error."""
    buffer_dtype: DtypeName | None = None
    """Dtype that floating-point buffers are cast to; null leaves them as they are."""
