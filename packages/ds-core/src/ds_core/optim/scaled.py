"""One optimizer step on gradients times a factor, in one pass over memory wherever the optimizer can."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ds_core.errors import EngineError
from ds_core.interfaces.optimizer import ScaledStep
from ds_core.ops import best

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["OptimizerStep"]


class OptimizerStep:
    """Drives a torch optimizer: ``step(factor)`` is ``step()`` on gradients multiplied by ``factor``.

    Three ways, by what the optimizer offers: its own ``step_scaled``; torch's fused kernels, which divide by
    ``grad_scale`` while they update; else one in-place multiplication before, skipped at 1.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._count = self._count_tensors()
        self._step_scaled = optimizer.step_scaled if isinstance(optimizer, ScaledStep) else None

    def _count_tensors(self) -> int:
        return sum(len(group["params"]) for group in self.optimizer.param_groups)

    @property
    def way(self) -> str:
        """How the factor is applied, for reports."""
        if self._step_scaled is not None:
            return "step_scaled"
        return "grad_scale" if self._divides_by_grad_scale() else "multiply"

    def _divides_by_grad_scale(self) -> bool:
        # Asked at each step: loading a state dict or add_param_group may change a group's implementation.
        return getattr(self.optimizer, "_step_supports_amp_scaling", False) and all(
            group.get("fused") for group in self.optimizer.param_groups
        )

    def step(self, factor: float) -> None:
        """Update every parameter that has a gradient.

        Args:
            factor: 1 / loss scale times the clipping coefficient. Gradients may be left multiplied by it, or not.

        Raises:
            EngineError: the optimizer was given more parameters, or fewer, since the engine was built.
        """
        if self._count_tensors() != self._count:
            raise EngineError(
                f"the optimizer has {self._count_tensors()} parameters, the engine was built with {self._count}: "
                "gradients of others are neither reduced nor counted in the norm",
                where="optimizer.param_groups",
                fix="give all parameters to initialize, instead of add_param_group afterwards",
            )
        if self._step_scaled is not None:
            self._step_scaled(factor)
            # torch's schedules look for this mark of step(), and warn when they are stepped without it.
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
            return
        if factor == 1.0:
            self.optimizer.step()
            return
        if self._divides_by_grad_scale() and 0.0 < factor < float("inf"):
            self._step_fused(factor)
            return
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            best("scale_", gradients[0].device).implementation(gradients, factor)
        self.optimizer.step()

    def _step_fused(self, factor: float) -> None:
        device = next(
            (p.device for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None),
            torch.device("cpu"),
        )
        # torch's contract with its GradScaler: an optimizer that supports amp scaling reads these two attributes.
        self.optimizer.grad_scale = torch.tensor(1.0 / factor, dtype=torch.float32, device=device)  # type: ignore[attr-defined]
        self.optimizer.found_inf = None  # type: ignore[attr-defined]
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.grad_scale, self.optimizer.found_inf  # type: ignore[attr-defined]
