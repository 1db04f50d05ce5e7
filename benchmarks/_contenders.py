"""The training loops that are compared: ours, and the ones a person would write by hand in plain PyTorch.

All do the same work per optimizer step: accumulation, the mean over ranks, clipping by the global norm, fused AdamW
and, where the recipe asks for it, a warm-up of the learning rate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

__all__ = ["Contender", "DdpLoop", "DsCore", "PlainLoop", "Recipe", "largest_difference"]


@dataclass(frozen=True)
class Recipe:
    """What one optimizer step consists of."""

    micro_batch: int
    accumulation: int
    clipping: float = 1.0
    lr: float = 1e-4
    warmup_steps: int = 0
    """Length of the logarithmic warm-up from 0; 0: the learning rate is constant."""

    @property
    def adamw(self) -> dict[str, Any]:
        """Every parameter of AdamW, so that no contender's default matters."""
        return {"lr": self.lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the optimizer step number ``step``, from 0, under WarmupLR's formula."""
        if self.warmup_steps == 0 or step > self.warmup_steps:
            return self.lr
        return self.lr * math.log(step) / math.log(max(2, self.warmup_steps)) if step > 0 else 0.0

    def config(self) -> dict[str, Any]:
        """Return the same recipe as a configuration for ``ds_core.initialize``."""
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clipping,
            "optimizer": {"type": "AdamW", "params": {**self.adamw, "betas": list(self.adamw["betas"])}},
        }
        if self.warmup_steps:
            params = {"warmup_min_lr": 0.0, "warmup_max_lr": self.lr, "warmup_num_steps": self.warmup_steps}
            config["scheduler"] = {"type": "WarmupLR", "params": params}
        return config


class Contender(ABC):
    """One training loop with its own model, optimizer and place in the data."""

    def __init__(self, recipe: Recipe, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """``batches``: used in turn, from the first again after the last."""
        self.recipe = recipe
        self.losses: list[Tensor] = []
        """The loss of every micro-batch so far."""
        self._batches = batches

    def step(self) -> None:
        """Do one optimizer step: ``recipe.accumulation`` micro-batches and the update."""
        last = self.recipe.accumulation - 1
        for micro in range(self.recipe.accumulation):
            inputs, targets = self._batches[len(self.losses) % len(self._batches)]
            self.losses.append(self._micro_step(inputs, targets, is_last=micro == last).detach())
        self._update()

    @abstractmethod
    def _micro_step(self, inputs: Tensor, targets: Tensor, *, is_last: bool) -> Tensor:
        """Run forward and backward; return the loss, not divided."""

    @abstractmethod
    def _update(self) -> None: ...

    def close(self) -> None:  # noqa: B027  most have nothing to release
        """Release what outlives the object."""


class PlainLoop(Contender):
    """A hand-written loop for one process."""

    name = "plain loop"

    def __init__(self, module: nn.Module, recipe: Recipe, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__(recipe, batches)
        self._module = module
        self._parameters = list(module.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, **recipe.adamw, fused=True)
        self._steps = 0

    @property
    def parameter_bytes(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self._parameters)

    def _micro_step(self, inputs: Tensor, targets: Tensor, *, is_last: bool) -> Tensor:
        loss: Tensor = self._module(inputs, targets)
        self._backward(loss)
        return loss

    def _backward(self, loss: Tensor) -> None:
        accumulation = self.recipe.accumulation
        (loss / accumulation if accumulation > 1 else loss).backward()

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._parameters, self.recipe.clipping)
        if self.recipe.warmup_steps:
            lr = self.recipe.lr_at(self._steps)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._steps += 1


class DdpLoop(PlainLoop):
    """A hand-written loop around DistributedDataParallel, with its default bucket size."""

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        batches: Sequence[tuple[Tensor, Tensor]],
        *,
        gradient_as_bucket_view: bool,
    ) -> None:
        self._ddp = DistributedDataParallel(module, gradient_as_bucket_view=gradient_as_bucket_view)
        super().__init__(self._ddp, recipe, batches)

    def _micro_step(self, inputs: Tensor, targets: Tensor, *, is_last: bool) -> Tensor:
        with nullcontext() if is_last else self._ddp.no_sync():
            return super()._micro_step(inputs, targets, is_last=is_last)


class DsCore(Contender):
    """Ours: the engine of ``ds_core.initialize``."""

    def __init__(self, module: nn.Module, recipe: Recipe, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        # Not at the top: --self-check compares a peer with itself and needs no engine.
        import ds_core

        super().__init__(recipe, batches)
        self._engine = ds_core.initialize(
            model=module, model_parameters=list(module.parameters()), config=recipe.config()
        )[0]

    def _micro_step(self, inputs: Tensor, targets: Tensor, *, is_last: bool) -> Tensor:
        loss: Tensor = self._engine(inputs, targets)
        self._engine.backward(loss)
        self._engine.step()
        return loss

    def _update(self) -> None:
        """Nothing left: the engine's own ``step`` did it at the last micro-batch."""

    def close(self) -> None:
        self._engine.destroy()


def largest_difference(ours: Contender, peer: Contender, first: int | None = None) -> float:
    """Return the largest relative difference between the losses of the two, which must be equally many.

    Args:
        ours: one of the two.
        peer: the other; differences are relative to its losses.
        first: compare only so many losses from the start; None: all.
    """
    one, two = (torch.stack(contender.losses[:first]).double() for contender in (ours, peer))
    return float(((one - two).abs() / two.abs()).max())
