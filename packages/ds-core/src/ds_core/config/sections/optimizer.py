"""Sections ``optimizer`` and ``scheduler``: a name and the arguments of its constructor."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ds_core.config.section import NotBuilt, Section

__all__ = ["OptimizerSection", "SchedulerSection"]


class OptimizerSection(Section):
    """Which optimizer updates the weights; without it the caller brings one."""

    source = "spec/core.md 2.4, 3.4"

    type: Annotated[str, Field(min_length=1)]
    """Name of an optimizer: an entry of ``ds_core.optimizer``, or a class of ``torch.optim``."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its constructor, such as ``lr`` and ``betas``."""
    legacy_fusion: Annotated[bool, NotBuilt(False)] = False
    """Older kernels of DeepSpeed's fused optimizers."""


class SchedulerSection(Section):
    """Which schedule moves the learning rate; without it the rate stays, or the caller brings a scheduler."""

    source = "spec/core.md 2.4, 4"

    type: Annotated[str, Field(min_length=1)]
    """Name of a schedule: an entry of ``ds_core.scheduler``, or a class of ``torch.optim.lr_scheduler``."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its constructor, such as ``warmup_num_steps``."""
