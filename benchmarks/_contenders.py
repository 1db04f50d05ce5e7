"""The training loops that are compared: ours, and the ones a person would write by hand in plain PyTorch.

All do the same work per optimizer step: accumulation, the mean over ranks, clipping by the global norm, fused AdamW
and, where the recipe asks for it, a warm-up of the learning rate. In low precision they also cast, scale the loss
(fp16) and send gradients in the same dtype.

Note: what low precision means here. Ours is what the configuration's section does: ``bf16`` and ``fp16`` store the
model in that dtype and update fp32 masters, ``autocast`` keeps fp32 weights. A hand-written loop has both ways: with
``masters`` it does what ours does, else it is autocast over fp32 weights, the usual recipe of plain PyTorch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

__all__ = [
    "DTYPES",
    "SCALE_POWER",
    "Contender",
    "DdpLoop",
    "DsCore",
    "PlainLoop",
    "Recipe",
    "add_dtype_argument",
    "largest_difference",
]

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.bfloat16}
"""What ``--dtype`` may be -> what matrix products compute in; None: in the dtype of the weights, fp32."""
SCALE_POWER, SCALE_WINDOW = 12, 100_000
"""The loss scale of fp16 starts at 2**SCALE_POWER and would double after SCALE_WINDOW steps, more than are run.

Nothing overflows there, so both update in every step. Times 2**16 a loss in fp16 is inf, and who skips is up to how the
scale is applied.
"""


def add_dtype_argument(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """Add ``--dtype``, one row each."""
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        nargs="+",
        default=list(default),
        help=f"precision, one row each (default: {' '.join(default)})",
    )


@dataclass(frozen=True)
class Recipe:
    """What one optimizer step consists of."""

    micro_batch: int
    accumulation: int
    clipping: float = 1.0
    lr: float = 1e-4
    warmup_steps: int = 0
    """Length of the logarithmic warm-up from 0; 0: the learning rate is constant."""
    dtype: str = "fp32"
    """One of ``DTYPES``; see "Note: what low precision means here"."""

    @property
    def compute(self) -> torch.dtype | None:
        """What matrix products compute in, and gradients are sent in; None: fp32."""
        return DTYPES[self.dtype]

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
        if self.dtype == "bf16":
            config["bf16"] = {"enabled": True, "auto_cast": True}
        elif self.dtype == "fp16":
            # hysteresis 1: the first overflow halves the scale, as in torch's GradScaler.
            scaling = {"initial_scale_power": SCALE_POWER, "loss_scale_window": SCALE_WINDOW, "hysteresis": 1}
            config["fp16"] = {"enabled": True, "auto_cast": True, **scaling}
        elif self.dtype == "autocast":
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
            # Else only the gradients of linear layers and convolutions would travel in bf16; DDP's hook sends all so.
            config["communication_data_type"] = "bf16"
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

    def __init__(
        self, module: nn.Module, recipe: Recipe, batches: Sequence[tuple[Tensor, Tensor]], *, masters: bool = False
    ) -> None:
        """``masters``: store ``module`` in the recipe's dtype and update fp32 copies; False: autocast, if not fp32."""
        super().__init__(recipe, batches)
        self._module = module
        self._parameters = list(module.parameters())
        self._updated: Sequence[Tensor] = self._parameters
        """What the optimizer updates."""
        self._masters = masters
        if masters:
            self._updated = [parameter.detach().clone() for parameter in self._parameters]
            module.to(recipe.compute)
        self._optimizer = torch.optim.AdamW(self._updated, **recipe.adamw, fused=True)
        self._scaler: torch.amp.GradScaler | None = None
        device = self._parameters[0].device.type
        if recipe.dtype == "fp16":
            self._scaler = torch.amp.GradScaler(device, init_scale=2.0**SCALE_POWER, growth_interval=SCALE_WINDOW)
        self._autocast: AbstractContextManager[None] = nullcontext()
        if recipe.compute is not None and not masters:
            self._autocast = torch.autocast(device, dtype=recipe.compute)
        self._steps = 0

    @property
    def parameter_bytes(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self._parameters)

    def _micro_step(self, inputs: Tensor, targets: Tensor, *, is_last: bool) -> Tensor:
        if self._masters:
            inputs, targets = (_cast(tensor, self.recipe.compute) for tensor in (inputs, targets))
        with self._autocast:
            loss: Tensor = self._module(inputs, targets)
        self._backward(loss)
        return loss

    def _backward(self, loss: Tensor) -> None:
        accumulation = self.recipe.accumulation
        if accumulation > 1:
            loss = loss / accumulation
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def _update(self) -> None:
        if self._masters:
            for master, parameter in zip(self._updated, self._parameters, strict=True):
                assert parameter.grad is not None
                master.grad = parameter.grad.float()
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self._updated, self.recipe.clipping)
        if self.recipe.warmup_steps:
            lr = self.recipe.lr_at(self._steps)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
        if self._scaler is not None:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            self._optimizer.step()
        self._optimizer.zero_grad()
        if self._masters:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, self._updated)
            self._module.zero_grad()
        self._steps += 1


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _send_in_bf16(group: Any, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations; these are strings
    # torch's own hook, which DDP refuses by its name where the backend is not NCCL. gloo sums bf16 all the same.
    return default_hooks.bf16_compress_hook(group, bucket)


_SEND_IN = {torch.bfloat16: _send_in_bf16, torch.float16: default_hooks.fp16_compress_hook}


class DdpLoop(PlainLoop):
    """A hand-written loop around DistributedDataParallel, with its default bucket size."""

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        batches: Sequence[tuple[Tensor, Tensor]],
        *,
        gradient_as_bucket_view: bool,
        masters: bool = False,
        every_backward: bool = False,
    ) -> None:
        """``every_backward``: reduce in each backward, not only in the last of an accumulation window."""
        # First: it may cast the module, and DDP makes its buckets of what it is given.
        super().__init__(module, recipe, batches, masters=masters)
        self._module = self._ddp = DistributedDataParallel(module, gradient_as_bucket_view=gradient_as_bucket_view)
        if recipe.compute is not None and not masters:
            self._ddp.register_comm_hook(None, _SEND_IN[recipe.compute])
        self._every_backward = every_backward

    def _micro_step(self, inputs: Tensor, targets: Tensor, *, is_last: bool) -> Tensor:
        with nullcontext() if is_last or self._every_backward else self._ddp.no_sync():
            return super()._micro_step(inputs, targets, is_last=is_last)


class DsCore(Contender):
    """Ours: the engine of ``ds_core.initialize``."""

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        batches: Sequence[tuple[Tensor, Tensor]],
        *,
        zero: Mapping[str, Any] | None = None,
        activation: Mapping[str, Any] | None = None,
        prepare: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Build an engine.

        Args:
            module: what it trains.
            recipe: what a step is.
            batches: as the base says.
            zero: the section ``zero_optimization``; None: stage 0.
            activation: the section ``activation_checkpointing``.
            prepare: does something to ``module`` first.
        """
        # Not at the top: --self-check compares a peer with itself and needs no engine.
        import ds_core

        super().__init__(recipe, batches)
        config = recipe.config()
        if zero is not None:
            config["zero_optimization"] = dict(zero)
        if activation is not None:
            config["activation_checkpointing"] = dict(activation)
        if prepare is not None:
            prepare(module)
        self._engine = ds_core.initialize(model=module, model_parameters=list(module.parameters()), config=config)[0]

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
