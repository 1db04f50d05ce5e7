"""Sections ``fp16``, ``bf16`` and ``torch_autocast``, each of which enables a plugin, and ``data_types``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from ds_core.config.section import Count, DtypeName, Int, NoEffect, Number, PositiveInt, Section

__all__ = ["Bf16Section", "DataTypesSection", "Fp16Section", "TorchAutocastSection"]


CONSTANT = NoEffect("loss_scale is constant", when=lambda config: config.fp16.loss_scale > 0)


class Fp16Section(Section):
    """Half precision with loss scaling."""

    source = "spec/core.md 2.5, spec/fp16.md 1.1"

    enabled: bool = False
    """Train in fp16."""
    auto_cast: bool = False
    """Cast floating-point inputs of forward to half, positional and keyword ones, however deep in lists and dicts."""
    loss_scale: Annotated[Number, Field(ge=0)] = 0.0
    """Constant factor of the loss; 0 finds it while training."""
    initial_scale_power: Annotated[Count, CONSTANT] = 16
    """The found scale starts at two to this power."""
    loss_scale_window: Annotated[Int, CONSTANT] = 1000
    """Steps without overflow after which the scale doubles; below 1 is an error where the scale is found."""
    hysteresis: Annotated[PositiveInt, CONSTANT] = 2
    """Overflows before the scale is halved."""
    consecutive_hysteresis: Annotated[bool, CONSTANT] = False
    """A step without overflow gives the hysteresis back."""
    min_loss_scale: Annotated[Int, CONSTANT] = 1
    """The found scale never falls below this; below 1 is an error where the scale is found."""
    fp16_master_weights_and_grads: bool = False
    """Master weights and gradients in fp16; ZeRO with CPU offload only."""

    def initial_dynamic_scale(self) -> int:
        """Return the loss scale that training starts with where it is found.

        >>> Fp16Section(initial_scale_power=4).initial_dynamic_scale()
        16
        """
        return 1 << self.initial_scale_power

    def dynamic_loss_scale_args(self) -> dict[str, Any]:
        """Return what a loss scaler that finds the scale is made of, under DeepSpeed's names.

        >>> sorted(Fp16Section().dynamic_loss_scale_args())
        ['consecutive_hysteresis', 'delayed_shift', 'init_scale', 'min_scale', 'scale_window']
        """
        return {
            "init_scale": self.initial_dynamic_scale(),
            "scale_window": self.loss_scale_window,
            "delayed_shift": self.hysteresis,
            "consecutive_hysteresis": self.consecutive_hysteresis,
            "min_scale": self.min_loss_scale,
        }


AT_ONCE = NoEffect("every gradient is added as soon as autograd made it")


class Bf16Section(Section):
    """bfloat16 weights and fp32 masters; needs no loss scaling."""

    source = "spec/core.md 2.6, spec/fp16.md 1.2"

    enabled: bool = False
    """Train in bf16."""
    auto_cast: bool = False
    """Cast floating-point inputs of forward to bf16, as ``fp16.auto_cast`` does; DeepSpeed has no such key here."""
    immediate_grad_update: Annotated[bool, AT_ONCE] = False
    """Accepted: each gradient is added to the accumulated one as soon as autograd made it, in any case."""
    check_grad_overflow: bool = True
    """Skip a step whose gradients hold inf or NaN."""
    bf16_master_weights_and_grads: bool = False
    """Master weights and gradients in bf16; ZeRO only."""
    bf16_optimizer_states: bool = False
    """Optimizer state in bf16; needs ``bf16_master_weights_and_grads``."""


def _dotted(name: str) -> str:
    if "." not in name or not all(part.isidentifier() for part in name.split(".")):
        raise PydanticCustomError("dotted_name", 'must be a dotted name such as "torch.nn.Linear"')
    return name


ONE_DTYPE_CHOSEN = NoEffect(
    "communication_data_type holds for all", when=lambda config: config.communication_data_type is not None
)
ONE_DTYPE_OF_WEIGHTS = NoEffect(
    "every gradient is reduced in the dtype of the weights",
    when=lambda config: config.enables("fp16") or config.enables("bf16"),
)
Modules = tuple[Annotated[str, AfterValidator(_dotted)], ...]


class TorchAutocastSection(Section):
    """fp32 weights, forward under ``torch.autocast``."""

    source = "spec/core.md 2.7"

    enabled: bool = False
    """Run forward under autocast."""
    dtype: DtypeName = "bfloat16"
    """The lower precision, float16 or bfloat16; null is the default."""
    lower_precision_safe_modules: Annotated[Modules, ONE_DTYPE_CHOSEN, ONE_DTYPE_OF_WEIGHTS] = (
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.conv.Conv1d",
        "torch.nn.modules.conv.Conv2d",
        "torch.nn.modules.conv.Conv3d",
    )
    """Classes whose own parameters are communicated in the lower precision, as dotted names; null is the default."""


class DataTypesSection(Section):
    """Dtypes that hold whatever the precision is."""

    source = "spec/core.md 2.7"

    grad_accum_dtype: DtypeName | None = None
    """Dtype in which gradients are summed over micro-batches; null is that of the weights."""
    param_dtype: DtypeName | None = None
    """Dtype of the weights: float16 with ``fp16``, bfloat16 with ``bf16``, else float32; anything else is an error."""
    buffer_dtype: DtypeName | None = None
    """Dtype that floating-point buffers are cast to; null leaves them as they are."""
