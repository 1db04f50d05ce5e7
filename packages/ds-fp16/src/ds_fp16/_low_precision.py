"""What the faces of fp16 and bf16 have in common: low-precision parameters, and masters in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ds_core.engine.optimizer_face import OptimizerFace
from ds_core.errors import CheckpointError, EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

__all__ = ["LowPrecisionFace", "flat", "not_scaled", "split"]


class LowPrecisionFace(OptimizerFace):
    """What the three classes have in common: low-precision parameters with fp32 masters."""

    norm_type = 2
    mpu: Any = None
    """Always None: model parallelism is not built."""
    timers: Any = None
    """Always None: the engine's steps are not timed."""

    def _low(self) -> list[list[nn.Parameter]]:
        """Return the model's parameters, by group, in the order of the masters."""
        return [list(group["params"]) for group in self._engine.parts.partition.inputs.param_groups]

    def _masters(self) -> list[list[Tensor]]:
        return [list(group["params"]) for group in self.param_groups]

    @property
    def low_precision_dtype(self) -> torch.dtype:
        """What the model's parameters are stored in."""
        dtype = self._engine.parts.precision.plan.stored
        assert dtype is not None  # both precisions store in one
        return dtype

    @property
    def has_executed_step(self) -> bool:
        """Whether the weights were ever updated, here or before the checkpoint that was loaded."""
        return bool(self._engine.progress.global_steps > self._engine.progress.skipped_steps)


def flat(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return each group in one new 1-d tensor."""
    return [torch.cat([tensor.detach().reshape(-1) for tensor in group]) for group in groups]


def split(flats: Sequence[Tensor], like: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Return views of ``flats`` in the shapes of ``like``."""
    sizes = [sum(tensor.numel() for tensor in group) for group in like]
    given = [whole.numel() for whole in flats]
    if sizes != given:
        raise CheckpointError(
            f"the state has groups of {given} elements, the optimizer {sizes}",
            where="optimizer.load_state_dict",
            fix="build the same parameter groups from the same model",
        )
    return [
        [part.view(own.shape) for own, part in zip(group, whole.split([own.numel() for own in group]), strict=True)]
        for whole, group in zip(flats, like, strict=True)
    ]


def not_scaled(where: str) -> EngineError:
    return EngineError(
        "the loss is not scaled in bf16, whose range is that of fp32",
        where=where,
        fix="leave the call out, or use fp16",
    )
