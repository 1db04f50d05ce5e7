"""The small parts of a step that are nobody's plugin: the accumulation window, the norm, the clip, the schedule."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from ds_core.errors import EngineError
from ds_core.interfaces.activation import Attached

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ds_core.engine.overflow import OverflowRecord
    from ds_core.interfaces.checkpoint import CheckpointEngine
    from ds_core.interfaces.partition import Partition, SquaredNorm
    from ds_core.interfaces.precision import Precision
    from ds_core.interfaces.scheduler import LRSchedule
    from ds_core.optim.scaled import OptimizerStep

__all__ = ["Accumulation", "Clip", "Outcome", "Parts", "ScheduleStep", "StepRecord", "global_norm"]


class Outcome(Enum):
    """How a call of ``engine.step()`` ended."""

    ACCUMULATED = "accumulated"
    UPDATED = "updated"
    SKIPPED = "skipped"


class Accumulation:
    """Counts micro-batches, and knows which one ends an accumulation window."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        """Micro-batches per window."""
        self.micro_steps = 0
        """Micro-batches since training began."""
        self.in_window = 0
        """Micro-batches since the last window ended."""
        self.override: bool | None = None
        """What ``set_gradient_accumulation_boundary`` said; it stays until it says otherwise."""
        self.backwards = 0
        """Backward calls of the micro-batch under way."""

    @property
    def at_boundary(self) -> bool:
        if self.override is not None:
            return self.override
        return self.in_window + 1 >= self.steps

    def advance(self) -> None:
        """End a micro-batch.

        Raises:
            EngineError: it had no backward.
        """
        if self.backwards == 0:
            raise EngineError(
                "step() without a backward before it",
                where=f"micro-batch {self.micro_steps}",
                fix="call engine.backward(loss) first; loss.backward() called directly is not built yet",
            )
        self.in_window = 0 if self.at_boundary else self.in_window + 1
        self.backwards = 0
        self.micro_steps += 1


@dataclass(frozen=True)
class Clip:
    """Clipping by the global L2 norm (Pascanu et al., arXiv:1211.5063)."""

    max_norm: float
    """0 or less: gradients are not clipped."""

    def factor(self, norm: float, scale: float) -> float:
        """Return what gradients are multiplied by: unscaled, and clipped as ``clip_grad_norm_`` does.

        Args:
            norm: of the gradients as they are, scaled.
            scale: the loss scale they carry.
        """
        if self.max_norm <= 0:
            return 1.0 / scale
        # 1e-6 as in torch and DeepSpeed; it keeps the quotient finite at a zero norm. A NaN norm gives a NaN factor,
        # so weights show it, as in plain PyTorch.
        coefficient = self.max_norm / (norm / scale + 1e-6)
        return (coefficient if not coefficient >= 1.0 else 1.0) / scale


def global_norm(squared: SquaredNorm) -> float:
    """Return the L2 norm over all ranks. Collective over the groups named; the one host sync of a step."""
    if squared.groups:
        import torch.distributed as dist

        for group in squared.groups:
            dist.all_reduce(squared.value, group=group)
    return math.sqrt(value) if (value := squared.value.item()) >= 0 else float(value)


class ScheduleStep:
    """Moves the schedule after an update; the client may take it away (``engine.lr_scheduler = None``)."""

    def __init__(self, schedule: LRSchedule | None) -> None:
        self.schedule = schedule

    def step(self, **kwargs: Any) -> None:
        """Step once; ``kwargs`` are the caller's ``lr_kwargs``.

        Raises:
            EngineError: the schedule needs something ``lr_kwargs`` did not give, such as a metric.
        """
        if self.schedule is None:
            return
        try:
            self.schedule.step(**kwargs)
        except TypeError as error:
            if _takes(self.schedule.step, kwargs):
                raise  # a mistake inside of it, not in how it was called
            raise EngineError(
                f"{type(self.schedule).__name__}.step() refused its arguments: {error}",
                where=f"engine.step(lr_kwargs={kwargs!r})",
                fix='ReduceLROnPlateau needs engine.step(lr_kwargs={"metrics": loss})',
            ) from error


def _takes(call: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(call).bind(**kwargs)
    except TypeError:
        return False
    return True


@dataclass(frozen=True)
class StepRecord:
    """What observers are told at the end of each optimizer step."""

    global_step: int
    global_samples: int
    skipped_steps: int
    outcome: Outcome
    norm: float
    """Before clipping, unscaled."""
    lr: Sequence[float]
    loss_scale: float
    """Of the coming backward."""
    overflow: OverflowRecord | None = None
    """Where inf or NaN came from, in a step that had any."""


@dataclass(frozen=True)
class Parts:
    """What an engine is made of. Every field is an interface or a small part from here."""

    forward: Callable[..., Any]
    """The module, wrapped in the precision's casts where it has any."""
    precision: Precision
    partition: Partition
    optimizer: OptimizerStep | None
    """None: the engine only runs forward; the partition trains nothing then."""
    schedule: ScheduleStep
    accumulation: Accumulation
    clip: Clip
    checkpoint: CheckpointEngine
    group: Any
    """The data-parallel process group."""
    world_size: int
    """Ranks in ``group``."""
    activation: Attached = field(default_factory=Attached)
    """What the section ``activation_checkpointing`` does to the module."""
    observers: list[Callable[[StepRecord], None]] = field(default_factory=list)
