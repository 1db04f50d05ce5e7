"""Arguments of DeepSpeed's schedules, ``scheduler.params``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ds_core.config.sections.argument_types import Arguments, Flag, PerGroup, Rate, Real, StepCount, Steps, whole

__all__ = [
    "LRRangeTestArguments",
    "OneCycleArguments",
    "WarmupCosineLRArguments",
    "WarmupDecayLRArguments",
    "WarmupLRArguments",
]


class _Schedule(Arguments):
    """What every schedule takes."""

    source = "spec/core.md 4"

    last_batch_iteration: Annotated[int, Field(ge=-1), BeforeValidator(whole)] = -1
    """Step to go on from; -1 begins."""


class _Warmup(_Schedule):
    """What every schedule with a warmup takes."""

    warmup_num_steps: Steps = 1000
    """Steps of the warmup; 1 counts as 2."""
    warmup_type: Literal["log", "linear"] = "log"
    """Shape of the warmup over the steps."""


class WarmupLRArguments(_Warmup):
    """Rise from a smallest to a largest rate, then stay."""

    warmup_min_lr: PerGroup = 0.0
    """Learning rate of the first two updates, for all parameter groups or one per group."""
    warmup_max_lr: PerGroup | None = None
    """Learning rate after the warmup, for all parameter groups or one per group; null is each group's own."""


class WarmupDecayLRArguments(WarmupLRArguments):
    """Rise as ``WarmupLR``, then fall on a line."""

    total_num_steps: Steps
    """Steps until the rate is back at the smallest, warmup included."""
    warmup_max_lr: PerGroup | None = 0.001
    """Learning rate after the warmup, for all parameter groups or one per group; null is each group's own."""


class WarmupCosineLRArguments(_Warmup):
    """Rise to each group's own rate, then fall on half a cosine wave."""

    total_num_steps: Steps
    """Steps until the rate is at its smallest, warmup included."""
    warmup_min_ratio: Real = 0.0
    """Share of the group's own rate that the warmup begins at."""
    cos_min_ratio: Real = 0.0001
    """Share of the group's own rate that is left in the end."""


class OneCycleArguments(_Schedule):
    """One cycle of the rate up and down, and of the momentum down and up, then a decay."""

    cycle_min_lr: PerGroup
    """Learning rate at both ends of the cycle, for all parameter groups or one per group."""
    cycle_max_lr: PerGroup
    """Learning rate at the top of the cycle, for all parameter groups or one per group."""
    decay_lr_rate: Rate = 0.0
    """How fast the rate falls after the cycle, per ``decay_step_size`` steps."""
    cycle_first_step_size: Steps = 2000
    """Steps of the first half of the cycle."""
    cycle_second_step_size: StepCount | None = None
    """Steps of the second half; null is as many as of the first."""
    cycle_first_stair_count: StepCount = 0
    """Stairs of the first half; 0 for a slope."""
    cycle_second_stair_count: StepCount | None = None
    """Stairs of the second half; null is as many as of the first."""
    decay_step_size: StepCount = 0
    """Steps over which the decay acts once; 0 for no decay."""
    cycle_momentum: Flag = True
    """Move the momentum against the rate."""
    cycle_min_mom: Real = 0.8
    """Momentum at the top of the cycle."""
    cycle_max_mom: Real = 0.9
    """Momentum at both ends of the cycle."""
    decay_mom_rate: Rate = 0.0
    """How fast the momentum grows after the cycle, per ``decay_step_size`` steps."""


class LRRangeTestArguments(_Schedule):
    """A rate that rises without end, to find where training breaks."""

    lr_range_test_min_lr: PerGroup = 1e-3
    """Learning rate at the beginning, for all parameter groups or one per group."""
    lr_range_test_step_size: Steps = 2000
    """Steps in which the rate rises once."""
    lr_range_test_step_rate: Real = 1.0
    """How much it rises, as a multiple of the first rate."""
    lr_range_test_staircase: Flag = False
    """Rise in stairs instead of on a slope."""
