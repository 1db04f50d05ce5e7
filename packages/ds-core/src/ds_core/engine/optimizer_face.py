"""DeepSpeed's optimizer surface over an engine: attributes and methods, no mechanism.

Scaling, clipping, overflow and masters are the engine's, written once. A face says where they are under the names that
scripts made for DeepSpeed use (spec: ``docs/design/precision.md``).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch

from ds_core.comm import all_or_none
from ds_core.engine.parts import Outcome
from ds_core.errors import CheckpointError, ConfigError, EngineError, LossScaleError, NotBuiltError
from ds_core.interfaces.precision import LossScaler
from ds_core.ops import best

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from typing_extensions import Self

    from ds_core.engine.engine import DeepSpeedEngine

__all__ = ["DeepSpeedOptimizer", "OptimizerFace", "OverriddenScale"]

_LARGEST_SCALE = torch.finfo(torch.float32).max


class DeepSpeedOptimizer:
    """Base of everything that stands in for a torch optimizer as ``engine.optimizer``, for ``isinstance``.

    None of them is a ``torch.optim.Optimizer``: that one is their ``optimizer``.
    """


class OverriddenScale(LossScaler):
    """A loss scale that the caller chose, in front of a scaler that goes on learning. Only the latter is saved."""

    dynamic = False

    def __init__(self, inner: LossScaler, scale: float) -> None:
        self.inner = inner
        self._scale = scale

    @property
    def scale(self) -> float:
        return self._scale

    def update(self, *, overflowed: bool) -> None:
        # At its minimum the scaler gives up, for a scale that is not the one in force: that must not end training.
        with contextlib.suppress(LossScaleError):
            self.inner.update(overflowed=overflowed)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)


class OptimizerFace(DeepSpeedOptimizer):
    """What DeepSpeed's optimizer wrappers have in common, read from and written to the parts of an engine.

    It keeps nothing itself, so two faces over one engine are the same. Where a method is a step of training, every
    rank calls it.

    Args:
        engine: a :class:`ds_core.DeepSpeedEngine` with an optimizer.

    >>> import torch, ds_core
    >>> engine, _, _, _ = ds_core.initialize(
    ...     model=torch.nn.Linear(2, 1),
    ...     config={"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}},
    ... )
    >>> face = OptimizerFace(engine)
    >>> face.get_lr(), face.loss_scale, face.overflow
    (0.01, 1.0, False)
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine

    @classmethod
    def over(cls, engine: DeepSpeedEngine) -> Self:
        """Return the face of ``engine``, also for a subclass whose constructor takes a torch optimizer."""
        face = cls.__new__(cls)
        OptimizerFace.__init__(face, engine)
        return face

    # -- the torch optimizer ----------------------------------------------------------------------------------------

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer. Its parameters are masters, where the precision keeps them."""
        step = self._engine.parts.optimizer
        assert step is not None  # an engine without one has no face
        return step.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    def add_param_group(self, param_group: Mapping[str, Any]) -> None:
        """Train one more group of the model's parameters, from before the first step on. Collective.

        A schedule that has one rate per group must be made after it.

        Raises:
            EngineError: there was a backward already.
            ConfigError: they are not the model's, trained already, or frozen.
        """
        self.optimizer.add_param_group(dict(param_group))

    def get_lr(self) -> float:
        """Return the learning rate of the first group; ``engine.get_lr()`` has those of all."""
        return float(self.param_groups[0]["lr"])

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group; a schedule replaces it at its next step."""
        for group in self.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    # -- loss scale -------------------------------------------------------------------------------------------------

    @property
    def loss_scaler(self) -> LossScaler:
        """The precision's own scaler, also while its scale is overridden."""
        scaler = self._engine.parts.precision.scaler
        return scaler.inner if isinstance(scaler, OverriddenScale) else scaler

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether the scale is found while training."""
        return self.loss_scaler.dynamic

    @property
    def loss_scale(self) -> float | None:
        """The factor of the coming backward. Set it to go on from another one; a dynamic scaler learns from there.

        A subclass may have None where nothing is scaled.

        Raises:
            EngineError: set inside an accumulation window, while it is overridden, or where nothing is scaled.
        """
        return self.cur_scale

    @loss_scale.setter
    def loss_scale(self, scale: float) -> None:
        self._set_loss_scale(scale)

    @property
    def cur_scale(self) -> float:
        """The same as :attr:`loss_scale`."""
        return self._engine.parts.precision.scaler.scale

    @cur_scale.setter
    def cur_scale(self, scale: float) -> None:
        self._set_loss_scale(scale)

    def _set_loss_scale(self, scale: float) -> None:
        scale = _checked_scale(scale, "loss_scale")
        if self.custom_loss_scaler:
            raise EngineError(
                "the loss scale is overridden, so setting the scaler's would change nothing",
                where="loss_scale",
                fix="call override_loss_scale with the new value",
            )
        # Scalers that scale have DeepSpeed's attribute; a constant 1 has none.
        if not hasattr(self.loss_scaler, "cur_scale"):
            raise EngineError(
                f"{type(self.loss_scaler).__name__} has no scale to set: this precision does not scale the loss",
                where="loss_scale",
                fix="enable fp16, or call override_loss_scale",
            )
        self._refuse_inside_window("the loss scale cannot change")
        self.loss_scaler.cur_scale = scale

    @property
    def custom_loss_scaler(self) -> bool:
        """Whether :meth:`override_loss_scale` was called."""
        return isinstance(self._engine.parts.precision.scaler, OverriddenScale)

    @property
    def external_loss_scale(self) -> float | None:
        """What :meth:`override_loss_scale` was given, else None."""
        scaler = self._engine.parts.precision.scaler
        return scaler.scale if isinstance(scaler, OverriddenScale) else None

    def override_loss_scale(self, loss_scale: float) -> None:
        """Scale the loss and unscale gradients by ``loss_scale`` from now on. The precision's scaler goes on learning.

        Checkpoints hold the scaler and not this number.

        Raises:
            EngineError: inside an accumulation window: its gradients carry the scale so far.
        """
        loss_scale = _checked_scale(loss_scale, "override_loss_scale")
        self._refuse_inside_window("the loss scale cannot change")
        precision = self._engine.parts.precision
        try:
            # The seam lets a precision keep its scaler: whether it can be replaced shows here.
            precision.scaler = OverriddenScale(self.loss_scaler, loss_scale)  # type: ignore[misc]
        except AttributeError as error:
            raise EngineError(
                f"{type(precision).__name__} keeps its loss scaler",
                where="override_loss_scale",
                fix="use a precision whose attribute 'scaler' can be set, such as fp16",
            ) from error

    def needs_scaler(self) -> bool:
        """Return whether the loss must be scaled, by ``backward`` or :meth:`scale_if_loss`. Also for a constant scale.

        (DeepSpeed says False for a constant one, and divides by it all the same.)
        """
        return self.dynamic_loss_scale or self.custom_loss_scaler or self._engine.parts.precision.scaler.scale != 1.0

    def scale_if_loss(self, value: Any) -> Any:
        """Return a loss (one element, with a graph) times the loss scale, anything else as it is.

        ``backward`` scales by itself: do not give it what this returned.
        """
        if isinstance(value, torch.Tensor) and value.numel() == 1 and value.grad_fn is not None:
            scale = self._engine.parts.precision.scaler.scale
            return value if scale == 1.0 else value * scale
        return value

    # -- results of the last step -----------------------------------------------------------------------------------

    @property
    def overflow(self) -> bool:
        """Whether the last ``step()`` was skipped because gradients were inf or NaN."""
        return self._engine.progress.outcome is Outcome.SKIPPED

    @property
    def _global_grad_norm(self) -> float | None:
        """The L2 norm of the last step's gradients before clipping, unscaled; None before the first step."""
        return self._engine.progress.norm

    @property
    def clip_grad(self) -> float:
        """The largest gradient norm, 0 for any; set it to clip at another one from the next step on, on every rank."""
        return self._engine.parts.clip.max_norm

    @clip_grad.setter
    def clip_grad(self, max_norm: float) -> None:
        parts = self._engine.parts
        self._engine.parts = dataclasses.replace(
            parts, clip=dataclasses.replace(parts.clip, max_norm=_checked_norm(max_norm))
        )

    # -- training ---------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, create_graph: bool = False, retain_graph: bool = False) -> None:
        """Compute gradients of ``loss`` as ``engine.backward`` does; the loss is scaled here, once.

        Raises:
            NotBuiltError: ``create_graph``.
        """
        if create_graph:
            raise NotBuiltError(
                "create_graph=True is not built: gradients are reduced while autograd runs, outside of any graph",
                where="optimizer.backward",
                fix="leave it out; torch.autograd.grad gives second derivatives of the module by itself",
            )
        self._engine.backward(loss, retain_graph=retain_graph)

    def step(self, closure: Any = None) -> bool:
        """End a micro-batch as ``engine.step`` does; at the end of a window update the weights, unless they overflow.

        Returns:
            Whether the step was skipped because of an overflow, :attr:`overflow`.

        Raises:
            EngineError: a closure was given: the engine owns forward and backward.
        """
        if closure is not None:
            raise EngineError(
                "step() takes no closure: it would have to recompute the loss before gradients are reduced and clipped",
                where="optimizer.step",
                fix="call backward(loss) and then step()",
            )
        self._engine.step()
        return self.overflow

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients so far.

        Raises:
            EngineError: ``set_to_none`` is False. Gradients of zero would move momentum and decay weights of
                parameters that no loss depends on.
        """
        if not set_to_none:
            raise EngineError(
                "gradients are let go, not set to zero",
                where="optimizer.zero_grad(set_to_none=False)",
                fix="call zero_grad()",
            )
        self._engine.zero_grad()

    def is_gradient_accumulation_boundary(self) -> bool:
        return self._engine.is_gradient_accumulation_boundary()

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Say whether the coming backward and step end a window; None: count micro-batches again."""
        self._engine.set_gradient_accumulation_boundary(is_boundary)

    def unscale_and_clip_grads(
        self, grads: Tensor | Sequence[Tensor], total_norm: float, apply_scale: bool = True
    ) -> float:
        """Return what gradients of norm ``total_norm`` must be divided by: the loss scale, and more where they clip.

        ``step`` does this by itself, in one pass with the update; this is for gradients of the caller's own.

        Args:
            grads: scaled; divided in place.
            total_norm: of all of them, as they are.
            apply_scale: False: leave ``grads`` alone.
        """
        parts = self._engine.parts
        factor = parts.clip.factor(float(total_norm), parts.precision.scaler.scale)
        tensors = [grads] if isinstance(grads, torch.Tensor) else list(grads)
        if apply_scale and tensors:
            best("scale_", tensors[0].device).implementation(tensors, factor)
        return 1.0 / factor if factor else math.inf

    def refresh_fp32_params(self) -> None:
        """Begin anew from the model's parameters, which somebody has written to: masters are copied from them."""
        self._engine.parts.partition.refresh_masters()

    def initialize_optimizer_states(self) -> None:
        """Refused: torch optimizers make their state in the first step, and one taken for it would decay weights.

        (DeepSpeed takes it, with gradients of zero: AdamW's weights shrink and its step count starts at 1.)

        Raises:
            EngineError: always.
        """
        raise EngineError(
            "optimizer state is made by the first step; making it earlier would take a step, which decays weights",
            where="optimizer.initialize_optimizer_states",
            fix="leave the call out; loading a checkpoint needs no state to be there",
        )

    def destroy(self) -> None:
        """Destroy the engine under this face. Safe to repeat; the model stays usable."""
        self._engine.destroy()

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return optimizer state, scaler state and the tensors the optimizer updates (``parameters``, by group).

        Tensors are this rank's own, not copies, as in torch. ``engine.save_checkpoint`` saves more, for any world size.
        """
        return {
            "optimizer_state_dict": self.optimizer.state_dict(),
            "loss_scaler": self.loss_scaler.state_dict(),
            "parameters": self._updated(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], load_optimizer_states: bool = True) -> None:
        """Go on from :meth:`state_dict`; the model's parameters follow.

        Args:
            state_dict: of the same groups and shapes.
            load_optimizer_states: False: the torch optimizer stays as it is.

        Raises:
            CheckpointError: it is of other parameters, or holds what no loss scaler can be; nothing has changed then.
            EngineError: inside an accumulation window.
        """
        self._restore(
            self._required(state_dict, "parameters"),
            self._required(state_dict, "optimizer_state_dict") if load_optimizer_states else None,
            self._required(state_dict, "loss_scaler"),
        )

    def _updated(self) -> list[list[Tensor]]:
        """Return what the optimizer updates, by group, without autograd."""
        return [[tensor.detach() for tensor in group["params"]] for group in self.param_groups]

    def _restore(
        self,
        parameters: Sequence[Sequence[Tensor]],
        optimizer: Mapping[str, Any] | None,
        scaler: Mapping[str, Any],
    ) -> None:
        """Fill what :meth:`_updated` returns from ``parameters``, load the rest, and publish to the model.

        Where ranks hold different parts it is collective, and a rank that fails tells the others before they publish.
        """
        partition = self._engine.parts.partition
        group = self._engine.parts.group if partition.divides else None
        all_or_none(lambda: self._check_restorable(parameters, optimizer, scaler), group)
        all_or_none(lambda: self._restore_own(parameters, optimizer, scaler), group)
        partition.after_load()

    def _check_restorable(
        self,
        parameters: Sequence[Sequence[Tensor]],
        optimizer: Mapping[str, Any] | None,
        scaler: Mapping[str, Any],
    ) -> None:
        """Refuse what can be refused before anything changes."""
        self._refuse_inside_window("state cannot be loaded")
        here = self._updated()
        shapes, given = ([[list(t.shape) for t in group] for group in groups] for groups in (here, parameters))
        if shapes != given:
            raise CheckpointError(
                f"the state is of tensors {given}, the optimizer has {shapes}",
                where="optimizer.load_state_dict",
                fix="build the same parameter groups from the same model",
            )
        if optimizer is not None:
            self._check_groups(optimizer)
        copy.deepcopy(self.loss_scaler).load_state_dict(scaler)

    def _restore_own(
        self,
        parameters: Sequence[Sequence[Tensor]],
        optimizer: Mapping[str, Any] | None,
        scaler: Mapping[str, Any],
    ) -> None:
        """Load what :meth:`_check_restorable` let pass into what this rank has."""
        self.loss_scaler.load_state_dict(scaler)
        if optimizer is not None:
            self.optimizer.load_state_dict(dict(optimizer))
        for own, saved in zip(self._updated(), parameters, strict=True):
            for tensor, value in zip(own, saved, strict=True):
                tensor.copy_(value)

    def _check_groups(self, state: Mapping[str, Any]) -> None:
        given = [len(group["params"]) for group in self._required(state, "param_groups")]
        here = [len(group["params"]) for group in self.param_groups]
        if here != given:
            raise CheckpointError(
                f"the optimizer's state is of groups of {given} parameters, the optimizer has {here}",
                where="optimizer.load_state_dict",
                fix="build the same parameter groups from the same model",
            )

    @staticmethod
    def _required(state: Mapping[str, Any], key: str) -> Any:
        if key not in state:
            raise CheckpointError(
                f"the state has no {key!r}, it has {', '.join(map(str, state)) or 'nothing'}",
                where="optimizer.load_state_dict",
                fix="load what state_dict() of the same class returned",
            )
        return state[key]

    def _refuse_inside_window(self, what: str) -> None:
        window = self._engine.parts.accumulation
        if window.in_window or window.backwards:
            raise EngineError(
                f"{what} inside an accumulation window, whose gradients belong to what was before",
                where=f"micro-batch {window.micro_steps}",
                fix="do it after a step at the boundary",
            )


def _checked_scale(scale: Any, where: str) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale <= _LARGEST_SCALE:
        raise ConfigError(f"the loss scale is {scale!r}", where=where, fix="pass a number above 0 that fp32 can hold")
    return float(scale)


def _checked_norm(norm: Any) -> float:
    if isinstance(norm, bool) or not isinstance(norm, (int, float)) or not math.isfinite(norm):
        raise ConfigError(f"clip_grad is {norm!r}", where="clip_grad", fix="pass a finite number, 0 to clip nothing")
    return float(norm)
