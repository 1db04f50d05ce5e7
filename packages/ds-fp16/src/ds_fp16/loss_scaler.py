"""Loss scalers: the factor that keeps small fp16 gradients from vanishing, and the one rule by which it moves.

Names, signatures and attributes are DeepSpeed's (spec/fp16.md sections 3 to 5), so that its pickled scalers are
restored into these classes by their ``__dict__``. Each is a ``ds_core.interfaces.precision.LossScaler``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import torch

from ds_core.errors import CheckpointError, ConfigError, LossScaleError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from ds_core.config import Config

__all__ = [
    "CONSECUTIVE_HYSTERESIS",
    "DELAYED_SHIFT",
    "INITIAL_LOSS_SCALE",
    "LOSS_SCALE_PROFILE_DEFAULTS",
    "MIN_LOSS_SCALE",
    "SCALE_WINDOW",
    "CreateLossScaler",
    "DynamicLossScaler",
    "LossScaleConfig",
    "LossScaleProfile",
    "LossScaleProfileDefaults",
    "LossScaler",
    "LossScalerBase",
    "get_loss_scaler",
    "to_python_float",
]

INITIAL_LOSS_SCALE = "init_scale"
SCALE_WINDOW = "scale_window"
DELAYED_SHIFT = "delayed_shift"
CONSECUTIVE_HYSTERESIS = "consecutive_hysteresis"
MIN_LOSS_SCALE = "min_scale"

LARGEST_SCALE = torch.finfo(torch.float32).max
"""The scale multiplies an fp32 loss: a larger one is inf there, and every step would be skipped."""


def to_python_float(t: Any) -> float:
    """Return the one number in ``t``: a tensor, a numpy scalar, or a sequence whose first element it is.

    >>> to_python_float([0.5])
    0.5
    """
    return float(t.item() if hasattr(t, "item") else t[0])


class LossScalerBase:
    """A factor for the loss, ``cur_scale``.

    Args:
        cur_scale: the factor, finite and above 0.
    """

    def __init__(self, cur_scale: float) -> None:
        _check(0 < cur_scale <= LARGEST_SCALE, "cur_scale", cur_scale, "a number above 0 that fp32 can hold")
        self.cur_scale = cur_scale
        self.dynamic = False

    @property
    def loss_scale(self) -> float:
        return self.cur_scale

    @property
    def scale(self) -> float:
        """The factor of the coming backward."""
        return float(self.cur_scale)

    def update(self, *, overflowed: bool) -> None:
        """Learn how a step ended, see :meth:`update_scale`."""
        self.update_scale(overflowed)

    def update_scale(self, overflow: bool) -> None:
        """Learn whether the gradients of a step held inf or NaN. Called once per optimizer step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what training changed, as JSON; settings come from the configuration."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict` of any scaler, as far as the settings of this one allow."""

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return ``loss`` times the scale."""
        return loss * self.loss_scale

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Compute the gradients of the scaled loss."""
        torch.autograd.backward(self.scale_loss(loss), retain_graph=retain_graph)

    def scale_gradient(
        self, module: nn.Module, grad_in: Sequence[Tensor | None], grad_out: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Return ``grad_in`` times the scale; a backward hook of a module."""
        return tuple(None if grad is None else grad * self.loss_scale for grad in grad_in)

    @staticmethod
    def _has_inf_or_nan(x: Tensor) -> bool:
        # Element by element: a sum of large finite numbers may itself be inf.
        return not bool(torch.isfinite(x).all())


class LossScaler(LossScalerBase):
    """A scale that never changes, neither by overflows nor by loading."""

    def __init__(self, scale: float = 1) -> None:
        super().__init__(scale)

    def has_overflow(self, params: Iterable[Tensor]) -> bool:
        """Return False, as DeepSpeed does; the engine looks at the norm of the gradients, also at a static scale."""
        return False


class DynamicLossScaler(LossScalerBase):
    """A scale found while training: down by half on overflow, up by two after enough steps without.

    Note: the rule. Of the steps since the last overflow, counted 0, 1, 2, ..., those whose number is a positive
    multiple of ``scale_window`` double the scale and give the hysteresis back. An overflow takes one off the hysteresis
    where more than one is left, else it halves the scale. A scale that cannot be halved is an error.

    One addition to DeepSpeed's rule: a scale whose double fp32 cannot hold stays.

    Args:
        init_scale: the first scale.
        scale_window: good steps from one doubling to the next.
        min_scale: the scale never falls below this.
        delayed_shift: the hysteresis: overflows it takes to halve the scale the first time.
        consecutive_hysteresis: every good step gives the hysteresis back, not only one that doubles the scale.
        raise_error_at_min_scale: False: the scale stays at the minimum, and steps are skipped for as long as it takes.
        dtype: of the gradients; kept for who reads it.

    >>> scaler = DynamicLossScaler(16, scale_window=2, min_scale=1, delayed_shift=1, consecutive_hysteresis=False)
    >>> scaler.update_scale(True)
    >>> scaler.loss_scale
    8.0
    """

    def __init__(
        self,
        init_scale: float,
        scale_window: int,
        min_scale: float,
        delayed_shift: int,
        consecutive_hysteresis: bool,
        raise_error_at_min_scale: bool = True,
        dtype: torch.dtype = torch.half,
    ) -> None:
        super().__init__(init_scale)
        _check(scale_window >= 1, SCALE_WINDOW, scale_window, "at least 1")
        _check(delayed_shift >= 1, DELAYED_SHIFT, delayed_shift, "at least 1")
        _check(0 < min_scale <= init_scale, MIN_LOSS_SCALE, min_scale, f"above 0 and at most init_scale, {init_scale}")
        self.cur_iter = 0
        self.last_overflow_iter = -1
        self.scale_factor = 2.0
        self.scale_window = scale_window
        self.min_scale = min_scale
        self.delayed_shift = delayed_shift
        self.cur_hysteresis = delayed_shift
        self.consecutive_hysteresis = consecutive_hysteresis
        self.raise_error_at_min_scale = raise_error_at_min_scale
        self.dynamic = True
        self.dtype = dtype

    def update_scale(self, overflow: bool) -> None:
        """Move the scale for the next step.

        Raises:
            LossScaleError: an overflow at the minimum scale, with no hysteresis left. Nothing is changed.
        """
        if overflow:
            self._after_overflow()
            self.last_overflow_iter = self.cur_iter
        else:
            self._after_good_step()
        self.cur_iter += 1

    def _after_overflow(self) -> None:
        if self.delayed_shift > 1 and self.cur_hysteresis > 1:
            self.cur_hysteresis -= 1
        elif self.cur_scale > self.min_scale:
            self.cur_scale = max(self.cur_scale / self.scale_factor, self.min_scale)
        elif self.raise_error_at_min_scale:
            raise LossScaleError(
                f"gradients hold inf or NaN at loss scale {self.cur_scale:g}, the smallest allowed",
                where=f"loss scaler, optimizer step {self.cur_iter + 1}",
                fix="look for inf or NaN in data, loss and weights; lower the learning rate; or train in bf16",
            )

    def _after_good_step(self) -> None:
        if self.consecutive_hysteresis:
            self.cur_hysteresis = self.delayed_shift
        stable = self.cur_iter - self.last_overflow_iter - 1
        if stable > 0 and stable % self.scale_window == 0:
            self.cur_hysteresis = self.delayed_shift
            if self.cur_scale * self.scale_factor <= LARGEST_SCALE:
                self.cur_scale *= self.scale_factor

    def state_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "iteration": self.cur_iter,
            "last_overflow_iteration": self.last_overflow_iter,
            "hysteresis": self.cur_hysteresis,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; what ``state`` does not have stays as it is.

        The settings are those of this scaler: a scale below its minimum becomes the minimum, and no more hysteresis is
        left than it has.

        Raises:
            CheckpointError: a value that no scaler can have. Nothing is changed then.
        """
        scale = _number(state, "scale", self.scale)
        iteration = _number(state, "iteration", self.cur_iter)
        last_overflow = _number(state, "last_overflow_iteration", self.last_overflow_iter)
        hysteresis = _number(state, "hysteresis", self.cur_hysteresis)
        if not (0 < scale <= LARGEST_SCALE and -1 <= last_overflow <= iteration and hysteresis >= 1):
            raise CheckpointError(
                f"no loss scaler can be in this state: {dict(state)}",
                where="state of the loss scaler",
                fix="load another checkpoint, or only the weights of this one: load_module_only=True",
            )
        self.cur_scale = max(float(scale), float(self.min_scale))
        self.cur_iter = int(iteration)
        self.last_overflow_iter = int(last_overflow)
        self.cur_hysteresis = min(int(hysteresis), self.delayed_shift)

    def has_overflow_serial(self, params: Iterable[Tensor]) -> bool:
        """Return whether a gradient of ``params`` holds inf or NaN on this rank."""
        return any(param.grad is not None and self._has_inf_or_nan(param.grad) for param in params)

    def has_overflow(self, params: Iterable[Tensor]) -> bool:
        """As :meth:`has_overflow_serial`: no communication, so ask after gradients were reduced."""
        return self.has_overflow_serial(params)


def CreateLossScaler(  # noqa: N802 - DeepSpeed's name
    dtype: torch.dtype,
    static_loss_scale: float,
    dynamic_scaling: bool,
    dynamic_loss_args: Mapping[str, Any] | None,
) -> LossScalerBase:
    """Return the scaler for gradients of ``dtype``; only fp16 is scaled.

    Args:
        dtype: of the model.
        static_loss_scale: the scale if it is not found while training.
        dynamic_scaling: find it while training.
        dynamic_loss_args: arguments of :class:`DynamicLossScaler`, needed if so.

    Raises:
        ConfigError: the arguments are missing, or one is out of range.
    """
    if dtype != torch.float16:
        return LossScaler(1.0)
    if not dynamic_scaling:
        return LossScaler(static_loss_scale)
    if dynamic_loss_args is None:
        raise ConfigError(
            "dynamic loss scaling needs its settings, got None",
            where="CreateLossScaler(dynamic_loss_args)",
            fix=f"pass a dictionary with {INITIAL_LOSS_SCALE}, {SCALE_WINDOW}, {MIN_LOSS_SCALE}, {DELAYED_SHIFT} "
            f"and {CONSECUTIVE_HYSTERESIS}",
        )
    return DynamicLossScaler(dtype=dtype, **dynamic_loss_args)


def get_loss_scaler(config: Config) -> LossScalerBase:
    """Return the scaler that the section ``fp16`` asks for; where fp16 is not chosen, one that does not scale.

    Raises:
        ConfigError: a setting is out of range.
    """
    section = config.fp16
    if not config.enables("fp16"):
        return LossScaler(1.0)
    if section.loss_scale > 0:
        return CreateLossScaler(torch.float16, section.loss_scale, False, None)
    return CreateLossScaler(torch.float16, 1.0, True, section.dynamic_loss_scale_args())


class LossScaleProfile(Enum):
    """Which of DeepSpeed's two fp16 wrappers the defaults are for."""

    FUSED = auto()
    UNFUSED = auto()


@dataclass(frozen=True)
class LossScaleProfileDefaults:
    """Settings of dynamic scaling where none are given."""

    init_scale: float
    scale_window: int
    min_loss_scale: float
    scale_factor: float


LOSS_SCALE_PROFILE_DEFAULTS = {
    LossScaleProfile.FUSED: LossScaleProfileDefaults(2.0**32, 1000, 1.0, 2.0),
    LossScaleProfile.UNFUSED: LossScaleProfileDefaults(2.0**16, 1000, 0.25, 2.0),
}


class LossScaleConfig:
    """The scaling of a stage-0 wrapper, as its attribute ``loss_scale_config`` shows it.

    A view on :attr:`scaler`, which has the rule and the state. So hysteresis and the error at the minimum hold here as
    everywhere; settings that leave hysteresis out have none, like DeepSpeed's wrappers.

    Args:
        low_precision_dtype: of the model; only fp16 is scaled.
        dynamic_loss_scale: find the scale while training.
        static_loss_scale: the scale if not.
        dynamic_loss_args: arguments of :class:`DynamicLossScaler`; the profile's defaults stand in for missing ones.
        profile: whose defaults.
        initial_dynamic_scale: in place of the first scale of the profile.
    """

    def __init__(
        self,
        low_precision_dtype: torch.dtype,
        dynamic_loss_scale: bool,
        static_loss_scale: float,
        dynamic_loss_args: Mapping[str, Any] | None,
        *,
        profile: LossScaleProfile = LossScaleProfile.FUSED,
        initial_dynamic_scale: float | None = None,
    ) -> None:
        defaults = LOSS_SCALE_PROFILE_DEFAULTS[profile]
        arguments = {
            INITIAL_LOSS_SCALE: defaults.init_scale if initial_dynamic_scale is None else initial_dynamic_scale,
            SCALE_WINDOW: defaults.scale_window,
            MIN_LOSS_SCALE: defaults.min_loss_scale,
            DELAYED_SHIFT: 1,
            CONSECUTIVE_HYSTERESIS: False,
            **(dynamic_loss_args or {}),
        }
        self.use_grad_scaling = low_precision_dtype == torch.float16
        self.scaler = CreateLossScaler(low_precision_dtype, static_loss_scale, dynamic_loss_scale, arguments)

    @classmethod
    def of(cls, scaler: LossScalerBase, low_precision_dtype: torch.dtype) -> LossScaleConfig:
        """Return the view on a scaler that is there, such as an engine's; what one changes the other shows."""
        view = cls.__new__(cls)
        view.use_grad_scaling = low_precision_dtype == torch.float16
        view.scaler = scaler
        return view

    @property
    def dynamic_loss_scale(self) -> bool:
        return self.scaler.dynamic

    @property
    def cur_scale(self) -> float:
        return self.scaler.cur_scale

    @cur_scale.setter
    def cur_scale(self, value: float) -> None:
        self.scaler.cur_scale = value

    @property
    def cur_iter(self) -> int | None:
        """Steps so far; 0 at a static scale, which does not count them; None without scaling."""
        return self._dynamic.cur_iter if self._dynamic else 0 if self.use_grad_scaling else None

    @property
    def last_overflow_iter(self) -> int | None:
        """Number of the step that overflowed last, from 0, and -1 if none has; None: the scale is not dynamic."""
        return self._dynamic.last_overflow_iter if self._dynamic else None

    @property
    def scale_factor(self) -> float | None:
        return self._dynamic.scale_factor if self._dynamic else None

    @property
    def scale_window(self) -> int | None:
        return self._dynamic.scale_window if self._dynamic else None

    @property
    def min_loss_scale(self) -> float | None:
        return self._dynamic.min_scale if self._dynamic else None

    @property
    def _dynamic(self) -> DynamicLossScaler | None:
        return self.scaler if isinstance(self.scaler, DynamicLossScaler) else None


def _check(is_right: bool, name: str, value: Any, allowed: str) -> None:
    if not is_right:
        raise ConfigError(f"{name} is {value!r}, allowed is {allowed}", where="loss scaler", fix=f"pass another {name}")


def _number(state: Mapping[str, Any], name: str, otherwise: float) -> float:
    value = state.get(name, otherwise)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CheckpointError(
            f"{name} is {value!r}, expected a finite number",
            where="state of the loss scaler",
            fix="load another checkpoint, or only the weights of this one: load_module_only=True",
        )
    return value
