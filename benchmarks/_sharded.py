"""Peers that divide optimizer state over the ranks: DeepSpeed's own engine, and torch's ``fully_shard``."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from _contenders import Contender, Recipe
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _models import Gpt
    from torch import Tensor

__all__ = ["DeepSpeed", "FullyShard", "has_deepspeed"]


def has_deepspeed() -> bool:
    """Return whether DeepSpeed itself is installed."""
    return importlib.util.find_spec("deepspeed") is not None


class DeepSpeed(Contender):
    """DeepSpeed's engine with its defaults, at a stage of ZeRO.

    AdamW is torch's fused one, as for all others: DeepSpeed's own would be compiled first. Its bucket has the elements
    of the model: the default of 5e8 holds any of these models too, and takes 2 GB for it.
    """

    def __init__(self, module: Gpt, recipe: Recipe, batches: Sequence[tuple[Tensor, Tensor]], *, stage: int) -> None:
        import deepspeed

        super().__init__(recipe, batches)
        numel = sum(parameter.numel() for parameter in module.parameters())
        config = {**recipe.config(), "zero_optimization": {"stage": stage, "reduce_bucket_size": numel}}
        del config["optimizer"]
        if "bf16" in config:
            config["bf16"] = {"enabled": True}  # auto_cast there is ours; the batches are integers
        optimizer = torch.optim.AdamW(module.parameters(), **recipe.adamw, fused=True)
        self._engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)[
            0
        ]

    def _micro_step(self, inputs: Tensor, targets: Tensor, *, is_last: bool) -> Tensor:
        loss: Tensor = self._engine(inputs, targets)
        self._engine.backward(loss)
        self._engine.step()
        return loss

    def _update(self) -> None:
        """Nothing left: the engine's own ``step`` did it at the last micro-batch."""

    def close(self) -> None:
        self._engine.destroy()


class FullyShard(Contender):
    """A hand-written loop around ``fully_shard`` of each block.

    The fastest it has that divides what stage 2 does: weights stay whole from forward to backward, and gradients are
    reduced once per window. In bf16 its weights are fp32 shards, gathered and computed with in bf16.
    """

    def __init__(self, module: Gpt, recipe: Recipe, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__(recipe, batches)
        if recipe.dtype not in ("fp32", "bf16"):
            raise SystemExit(f"fully_shard is compared in fp32 and bf16, not in {recipe.dtype}: leave it out of --peer")
        device = next(module.parameters()).device
        mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=recipe.compute, reduce_dtype=recipe.compute)
        for part in (*module.blocks, module):
            fully_shard(part, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        self._module = module
        self._parameters = list(module.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, **recipe.adamw, fused=True)

    def _micro_step(self, inputs: Tensor, targets: Tensor, *, is_last: bool) -> Tensor:
        self._module.set_requires_gradient_sync(is_last)  # type: ignore[operator]  # fully_shard changed its class
        loss: Tensor = self._module(inputs, targets)
        (loss / self.recipe.accumulation).backward()
        return loss

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._parameters, self.recipe.clipping)
        self._optimizer.step()
        self._optimizer.zero_grad()
