"""DeepSpeed's mixed-precision optimizers by name: faces over an engine, which scales, clips, skips and updates.

``engine.optimizer`` is one of them in fp16 and bf16. Made by hand over a torch optimizer, for a training loop of the
caller's own, each builds a private engine over that optimizer's parameters.

Note: flat attributes. Nothing here is stored flat. Attributes called ``*_flat`` are copies made at each reading, so
writing to one changes nothing; the tensors themselves are in ``fp16_groups`` and ``fp32_groups``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ds_fp16._low_precision import LowPrecisionFace, flat, not_scaled, split
from ds_fp16._own_engine import build, only_the_config, precision_section, refuse, scaling_of
from ds_fp16.bf16_optimizer import BF16_Optimizer
from ds_fp16.loss_scaler import LossScaleConfig, LossScaleProfile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from ds_core.engine.engine import DeepSpeedEngine
    from ds_core.engine.optimizer_face import OptimizerFace
    from ds_fp16.norms import CheckOverflow

__all__ = ["BF16_Optimizer", "FP16_Optimizer", "FP16_UnfusedOptimizer", "bf16_face", "fp16_face"]

_FUSED_BY_NAME = frozenset({"FusedAdam", "OnebitAdam", "ZeroOneAdam"})


def fp16_face(engine: DeepSpeedEngine) -> OptimizerFace | None:
    """Return what ``engine.optimizer`` is in fp16: the fused class for an Adam, the unfused one for any other."""
    if engine.parts.optimizer is None:
        return None
    optimizer = engine.parts.optimizer.optimizer
    # torch's AdamW is an Adam too; the other names are of optimizers that are not torch's.
    fused = isinstance(optimizer, torch.optim.Adam) or type(optimizer).__name__ in _FUSED_BY_NAME
    return (FP16_Optimizer if fused else FP16_UnfusedOptimizer).over(engine)


def bf16_face(engine: DeepSpeedEngine) -> OptimizerFace | None:
    """Return what ``engine.optimizer`` is in bf16."""
    return None if engine.parts.optimizer is None else BF16_Optimizer.over(engine)


class _Fp16Face(LowPrecisionFace):
    """What the two fp16 classes have in common."""

    verbose: bool = True
    """As given. Nothing here prints; overflows are logged by the engine."""
    _profile: ClassVar[LossScaleProfile]
    """Whose defaults a dynamic scale has."""

    def _take_over(
        self,
        init_optimizer: torch.optim.Optimizer,
        deepspeed: Any,
        loss_scale_config: LossScaleConfig | None,
        dtype: torch.dtype,
        static_loss_scale: float,
        dynamic_loss_scale: bool,
        dynamic_loss_args: Mapping[str, Any] | None,
        verbose: bool,
        mpu: Any,
        clip_grad: float,
        *,
        initial_dynamic_scale: float | None = None,
        **refused: tuple[Any, str],
    ) -> None:
        """Become the face of a private engine over ``init_optimizer``: what the constructors have in common.

        Args:
            initial_dynamic_scale: None: not given.
            refused: more arguments that are not built, name -> (value, what to do instead).

        The others are those of the constructors.
        """
        where = type(self).__name__
        refuse(
            where,
            deepspeed=(deepspeed, "use engine.optimizer, which is this class over the engine's parts"),
            mpu=(mpu, "leave it out: all ranks are data-parallel"),
            **refused,
        )
        if loss_scale_config is None:
            loss_scale_config = scaling_of(
                where,
                dtype,
                static_loss_scale,
                dynamic_loss_scale,
                dynamic_loss_args,
                self._profile,
                initial_dynamic_scale,
            )
        else:
            only_the_config(
                where,
                static_loss_scale=static_loss_scale != 1.0,
                dynamic_loss_scale=dynamic_loss_scale,
                initial_dynamic_scale=initial_dynamic_scale is not None,
                dynamic_loss_args=dynamic_loss_args is not None,
            )
        section = precision_section(dtype, where)
        engine = build(init_optimizer, {section: {"enabled": True}, "gradient_clipping": clip_grad}, where=where)
        if section == "fp16":
            # JSON knows only powers of two as first scales, and whole numbers as smallest ones.
            engine.parts.precision.scaler = loss_scale_config.scaler
        super().__init__(engine)
        self.verbose = verbose

    @property
    def fp16_groups(self) -> list[list[nn.Parameter]]:
        """The model's parameters that are trained, by group."""
        return self._low()

    @property
    def fp32_groups(self) -> list[list[Tensor]]:
        """The masters, by group, one per parameter: what the torch optimizer updates."""
        return self._masters()

    @property
    def loss_scale_config(self) -> LossScaleConfig:
        """The loss scaling in force, a view on :attr:`loss_scaler`."""
        return LossScaleConfig.of(self.loss_scaler, self.low_precision_dtype)  # type: ignore[arg-type]

    @property
    def overflow_checker(self) -> CheckOverflow:
        """A checker of the parameters' gradients, for use between ``backward`` and ``step``; ``step`` needs none."""
        from ds_fp16.norms import CheckOverflow

        return CheckOverflow(self.fp16_groups)

    def _set_loss_scale(self, scale: float) -> None:
        if not self.loss_scale_config.use_grad_scaling:
            raise not_scaled(f"{type(self).__name__}.loss_scale")
        super()._set_loss_scale(scale)

    def _scaler_state(self) -> dict[str, Any]:
        """Return DeepSpeed's keys, and under ``loss_scaler`` what they have no place for: the hysteresis."""
        config = self.loss_scale_config
        found: dict[str, Any] = {
            "dynamic_loss_scale": config.dynamic_loss_scale,
            "cur_scale": config.cur_scale,
            "cur_iter": config.cur_iter,
        }
        if config.dynamic_loss_scale:
            found.update(
                last_overflow_iter=config.last_overflow_iter,
                scale_factor=config.scale_factor,
                scale_window=config.scale_window,
            )
        return {**found, "loss_scaler": self.loss_scaler.state_dict()}


class FP16_Optimizer(_Fp16Face):  # noqa: N801, DeepSpeed's name
    """fp16 parameters with fp32 masters and loss scaling; ``engine.optimizer`` in fp16 with an Adam.

    Made by hand it takes over ``init_optimizer``: its parameters are cast to ``low_precision_dtype``, in place, and
    the optimizer updates masters from then on. On several ranks it averages gradients, as an engine does::

        optimizer = FP16_Optimizer(torch.optim.AdamW(model.parameters()), dynamic_loss_scale=True)
        for x, y in batches:
            optimizer.backward(loss_of(model(x.half()), y))
            overflowed = optimizer.step()

    Args:
        init_optimizer: a torch optimizer over parameters of a model; groups stay groups, frozen parameters are only
            cast.
        deepspeed: not built; the optimizer of an engine is ``engine.optimizer``.
        loss_scale_config: the scaling, instead of the next four.
        low_precision_dtype: fp16, or bf16, which is not scaled.
        static_loss_scale: the scale if it is not found while training.
        dynamic_loss_scale: find it while training.
        initial_dynamic_scale: the first one then.
        dynamic_loss_args: arguments of :class:`ds_fp16.DynamicLossScaler`; missing ones have DeepSpeed's defaults for
            this class (window 1000, minimum 1, no hysteresis).
        verbose: either; nothing here prints.
        mpu: not built.
        clip_grad: largest gradient norm, 0 for any.
        fused_adam_legacy: not built.
        has_moe_layers: not built.
        timers: not built.

    Raises:
        NotBuiltError: an argument that is not built.
        ConfigError: arguments that contradict each other, or that this optimizer cannot be trained with.
    """

    _profile = LossScaleProfile.FUSED

    def __init__(
        self,
        init_optimizer: torch.optim.Optimizer,
        deepspeed: Any = None,
        loss_scale_config: LossScaleConfig | None = None,
        low_precision_dtype: torch.dtype = torch.float16,
        static_loss_scale: float = 1.0,
        dynamic_loss_scale: bool = False,
        initial_dynamic_scale: float = 2**32,
        dynamic_loss_args: Mapping[str, Any] | None = None,
        verbose: bool = True,
        mpu: Any = None,
        clip_grad: float = 0.0,
        fused_adam_legacy: bool = False,
        has_moe_layers: bool = False,
        timers: Any = None,
    ) -> None:
        self._take_over(
            init_optimizer,
            deepspeed,
            loss_scale_config,
            low_precision_dtype,
            static_loss_scale,
            dynamic_loss_scale,
            dynamic_loss_args,
            verbose,
            mpu,
            clip_grad,
            initial_dynamic_scale=None if initial_dynamic_scale == 2**32 else initial_dynamic_scale,
            fused_adam_legacy=(fused_adam_legacy, "leave it out: there is one step for every optimizer"),
            has_moe_layers=(has_moe_layers, "leave it out"),
            timers=(timers, "leave it out, and time the calls"),
        )

    @property
    def loss_scale(self) -> float | None:
        """As :attr:`OptimizerFace.loss_scale`; None in bf16, as in DeepSpeed."""
        return self.cur_scale if self.low_precision_dtype == torch.float16 else None

    @loss_scale.setter
    def loss_scale(self, scale: float) -> None:
        self._set_loss_scale(scale)

    def override_loss_scale(self, loss_scale: float) -> None:
        """As :meth:`OptimizerFace.override_loss_scale`, in fp16 only."""
        if self.low_precision_dtype != torch.float16:
            raise not_scaled("FP16_Optimizer.override_loss_scale")
        super().override_loss_scale(loss_scale)

    @property
    def fp16_groups_flat(self) -> list[Tensor]:
        """The parameters of each group in one 1-d tensor: a copy made at each reading."""
        return flat(self.fp16_groups)

    @property
    def fp32_groups_flat(self) -> list[Tensor]:
        """The masters of each group in one 1-d tensor: a copy made at each reading."""
        return flat(self.fp32_groups)

    def state_dict(self) -> dict[str, Any]:
        """Return optimizer state, masters (``fp32_groups_flat``), scaler and ``clip_grad``, under DeepSpeed's keys."""
        return {
            **(self._scaler_state() if self.low_precision_dtype == torch.float16 else {}),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "fp32_groups_flat": self.fp32_groups_flat,
            "clip_grad": self.clip_grad,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], load_optimizer_states: bool = True) -> None:
        """Go on from :meth:`state_dict`, or DeepSpeed's of this class.

        Settings stay as they are here: the window and minimum of the scale, and ``clip_grad``, which DeepSpeed
        overwrites.
        """
        flats = self._required(state_dict, "fp32_groups_flat")
        optimizer = self._required(state_dict, "optimizer_state_dict") if load_optimizer_states else None
        self._restore(split(flats, self.fp32_groups), optimizer, _scaler_state_in(state_dict))


class FP16_UnfusedOptimizer(_Fp16Face):  # noqa: N801, DeepSpeed's name
    """As :class:`FP16_Optimizer`, for optimizers that are not an Adam; the masters are not shown flat.

    Args:
        init_optimizer, deepspeed, loss_scale_config, low_precision_dtype, static_loss_scale, dynamic_loss_scale:
            as of :class:`FP16_Optimizer`.
        dynamic_loss_args: missing ones have DeepSpeed's defaults for this class (first scale 2**16, window 1000,
            minimum 0.25, no hysteresis).
        verbose, mpu, clip_grad: as there.
        fused_lamb_legacy: not built.

    Raises:
        NotBuiltError: an argument that is not built.
        ConfigError: arguments that contradict each other, or that this optimizer cannot be trained with.
    """

    _profile = LossScaleProfile.UNFUSED

    def __init__(
        self,
        init_optimizer: torch.optim.Optimizer,
        deepspeed: Any = None,
        loss_scale_config: LossScaleConfig | None = None,
        low_precision_dtype: torch.dtype = torch.float16,
        static_loss_scale: float = 1.0,
        dynamic_loss_scale: bool = False,
        dynamic_loss_args: Mapping[str, Any] | None = None,
        verbose: bool = True,
        mpu: Any = None,
        clip_grad: float = 0.0,
        fused_lamb_legacy: bool = False,
    ) -> None:
        self._take_over(
            init_optimizer,
            deepspeed,
            loss_scale_config,
            low_precision_dtype,
            static_loss_scale,
            dynamic_loss_scale,
            dynamic_loss_args,
            verbose,
            mpu,
            clip_grad,
            fused_lamb_legacy=(fused_lamb_legacy, "leave it out: there is one step for every optimizer"),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return optimizer state, masters (``fp32_groups``) and scaler, under DeepSpeed's keys.

        Tensors are this rank's own, not copies, as in torch.
        """
        return {
            **self._scaler_state(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "fp32_groups": self._updated(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], load_optimizer_states: bool = True) -> None:
        """Go on from :meth:`state_dict`, or DeepSpeed's of this class; the scale's window and minimum stay."""
        masters = self._required(state_dict, "fp32_groups")
        optimizer = self._required(state_dict, "optimizer_state_dict") if load_optimizer_states else None
        self._restore(masters, optimizer, _scaler_state_in(state_dict))


def _scaler_state_in(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a scaler of ours loads: its own state where there is one, else what DeepSpeed's keys say of it."""
    if "loss_scaler" in state:
        return dict(state["loss_scaler"])
    own = {"scale": "cur_scale", "iteration": "cur_iter", "last_overflow_iteration": "last_overflow_iter"}
    return {ours: state[theirs] for ours, theirs in own.items() if theirs in state}
