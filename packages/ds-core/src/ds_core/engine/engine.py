"""The engine: a short sequence over its parts. What the parts are is decided in ``build.py``."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ds_core import comm
from ds_core.engine.adding import begin_training
from ds_core.engine.face import EngineFace
from ds_core.engine.overflow import OverflowHistory, describe
from ds_core.engine.parts import Outcome, Parts, StepRecord, global_norm
from ds_core.errors import EngineError, LossScaleError

if TYPE_CHECKING:
    from torch import Tensor

    from ds_core.config import Config
    from ds_core.data import DeepSpeedDataLoader
    from ds_core.engine.overflow import OverflowRecord

__all__ = ["DeepSpeedEngine", "Progress"]


@dataclass
class Progress:
    """How far training is, and how its last step ended. (Apart from the module: it sets attributes slowly.)"""

    global_steps: int = 0
    global_samples: int = 0
    skipped_steps: int = 0
    outcome: Outcome = Outcome.ACCUMULATED
    norm: float | None = None
    """L2 norm of the last step's gradients before clipping, unscaled."""


class DeepSpeedEngine(EngineFace):
    """Runs a model in ``forward``, ``backward``, ``step``: the loop of spec/core.md section 3.

    Made by :func:`ds_core.initialize`. Every rank makes the same calls in the same order::

        for x, y in loader:
            loss = engine(x, y)
            engine.backward(loss)
            engine.step()
    """

    def __init__(
        self,
        module: nn.Module,
        parts: Parts,
        config: Config,
        *,
        device: torch.device,
        training_dataloader: DeepSpeedDataLoader | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.module = module
        self.parts = parts
        self.device = device
        self.training_dataloader = training_dataloader
        self._config = config
        self.progress = Progress()
        self.overflow_history = OverflowHistory()
        self._seeds: dict[tuple[Any, ...], Tensor] = {}
        self.is_destroyed = False
        self.has_begun = False
        """Whether there was a backward: parameter groups are final then."""
        comm.destroy_at_exit(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns, unchanged."""
        with self.parts.activation.active():
            return self.parts.forward(*args, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Compute gradients of ``loss``, scaled once: by the loss scale, the accumulation and the world size.

        In the last micro-batch of a window the gradients are summed over the ranks while autograd runs.

        Args:
            loss: one element, with a graph; the caller's loss of this micro-batch, its mean over samples.
            retain_graph: as torch's.
            scale_wrt_gas: False: the caller has divided by the accumulation steps already.

        Returns:
            The loss divided by the accumulation steps (not if ``scale_wrt_gas`` is False), without a graph.

        Raises:
            EngineError: not such a loss, or an engine without an optimizer.
            CommError: another rank is gone, or adds a parameter group meanwhile.
        """
        parts = self.parts
        partition = parts.partition
        if parts.optimizer is None:
            raise self._cannot("backward")
        _check_loss(loss)
        if not self.has_begun:
            begin_training(self)
        window = parts.accumulation
        divisor = window.steps if scale_wrt_gas else 1
        factor = parts.precision.scaler.scale * partition.loss_factor / divisor
        partition.begin_backward(reduce=window.at_boundary)
        try:
            # The factor enters as the gradient of the loss: the same numbers as loss * factor, without another node.
            torch.autograd.backward(loss, None if factor == 1.0 else self._seed(loss, factor), retain_graph)
        except BaseException:
            partition.abort_backward()
            raise
        partition.end_backward()
        window.backwards += 1
        return loss.detach() if divisor == 1 else loss.detach() / divisor

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """End a micro-batch; at the end of a window update the weights and move the schedule.

        Args:
            lr_kwargs: passed to the schedule's ``step``.

        Raises:
            EngineError: no backward before it, or an engine without an optimizer.
            LossScaleError: the gradients overflow at the smallest loss scale allowed.
        """
        parts = self.parts
        if parts.optimizer is None:
            raise self._cannot("step")
        at_boundary = parts.accumulation.at_boundary
        parts.accumulation.advance()
        if not at_boundary:
            self.progress.outcome = Outcome.ACCUMULATED
            return
        scale = parts.precision.scaler.scale
        norm = global_norm(parts.partition.reduce())
        # The norm is that of all ranks, so all agree to skip.
        skipped = parts.precision.overflowed(norm)
        overflow = None if math.isfinite(norm) else self._look_into_overflow(norm, scale, skipped=skipped)
        if not skipped:
            parts.optimizer.step(parts.clip.factor(norm, scale))
            parts.partition.publish()
        parts.partition.clear_gradients()
        if not skipped:
            parts.schedule.step(**(lr_kwargs or {}))
        self._finish_step(norm / scale, overflow, skipped=skipped)

    def _look_into_overflow(self, norm: float, scale: float, *, skipped: bool) -> OverflowRecord:
        source = self.parts.partition.find_overflow()
        return describe(
            source, self.module, step=self.progress.global_steps + 1, scale=scale, norm=norm, skipped=skipped
        )

    def _finish_step(self, norm: float, overflow: OverflowRecord | None, *, skipped: bool) -> None:
        if overflow is None:
            self.overflow_history.good_step()
        else:
            self.overflow_history.is_dynamic = self.parts.precision.scaler.dynamic
            self.overflow_history.note(overflow)
        progress = self.progress
        progress.norm = norm
        progress.outcome = Outcome.SKIPPED if skipped else Outcome.UPDATED
        progress.skipped_steps += skipped
        progress.global_steps += 1
        progress.global_samples += self.train_batch_size()
        try:
            self.parts.precision.after_step(skipped=skipped)
        except LossScaleError as error:
            raise self.overflow_history.explain(error) from error
        if self.parts.observers:
            record = StepRecord(
                progress.global_steps,
                progress.global_samples,
                progress.skipped_steps,
                progress.outcome,
                norm,
                self.get_lr(),
                self.parts.precision.scaler.scale,
                overflow,
            )
            for observe in self.parts.observers:
                observe(record)

    def _seed(self, loss: Tensor, factor: float) -> Tensor:
        """Return the gradient of ``loss`` that multiplies everything by ``factor``; the last few are kept."""
        key = (factor, loss.shape, loss.dtype, loss.device)
        seed = self._seeds.get(key)
        if seed is None:
            if len(self._seeds) >= 16:
                self._seeds.clear()
            seed = self._seeds[key] = torch.full_like(loss, factor, requires_grad=False)
        return seed

    def _cannot(self, call: str) -> EngineError:
        return EngineError(
            "this engine has no optimizer, so it only runs forward",
            where=f"engine.{call}",
            fix="pass optimizer= to initialize, or configure the section 'optimizer'",
        )

    def destroy(self) -> None:
        """Take the hooks off the model, and let buffers and the process group go. Safe to repeat.

        The model stays usable, as ``engine.module``, in the dtype it was stored in; every other use of the engine
        raises. Masters are let go: save a checkpoint before, where their digits are needed.

        Raises:
            CheckpointError: a save in the background failed, and nobody was told. Everything is let go all the same.
        """
        if self.is_destroyed:
            return
        self.is_destroyed = True
        try:
            self._end_saves()
        finally:
            self.parts.activation.detach()
            self.parts.partition.destroy()
            for observe in self.parts.observers:
                close = getattr(observe, "close", None)
                if close is not None:
                    close()
            self.training_dataloader = None
            self._seeds.clear()
            self.parts = cast("Parts", _Destroyed())

    def _end_saves(self) -> None:
        checkpoint = self.parts.checkpoint
        try:
            # Not where an error is on its way up: the other ranks may be elsewhere.
            if checkpoint.completes_at_commit and sys.exc_info()[1] is None:
                checkpoint.commit()
        finally:
            checkpoint.close()


class _Destroyed:
    """What is left of an engine's parts."""

    def __getattr__(self, name: str) -> Any:
        raise EngineError(
            "this engine was destroyed", where="engine", fix="make a new one; its model is engine.module as before"
        )


def _check_loss(loss: Any) -> None:
    fix = "reduce it to its mean over samples: loss.mean()"
    if not isinstance(loss, torch.Tensor):
        raise EngineError(f"the loss is a {type(loss).__name__}, not a tensor", where="engine.backward", fix=fix)
    if loss.numel() != 1:
        raise EngineError(f"the loss has shape {list(loss.shape)}, not one element", where="engine.backward", fix=fix)
    if not loss.requires_grad:
        raise EngineError(
            "the loss does not depend on anything that can be trained",
            where="engine.backward",
            fix="compute it from engine(...) outside torch.no_grad(), with at least one parameter that requires grad",
        )
