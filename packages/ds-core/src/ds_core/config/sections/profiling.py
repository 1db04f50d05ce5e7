"""Sections that measure: ``comms_logger``, ``flops_profiler`` and ``timers``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ds_core.config.section import Count, Int, Number, Section

__all__ = ["CommsLoggerSection", "FlopsProfilerSection", "ThroughputTimerSection", "TimersSection"]


class CommsLoggerSection(Section):
    """Logs size, time and bandwidth of collectives."""

    source = "spec/core.md 2.11"
    comes_with = "ds-core"

    enabled: bool = False
    """Log collectives."""
    prof_all: bool = True
    """Log every collective; false: those of ``prof_ops``."""
    prof_ops: tuple[str, ...] = ()
    """Names of the collectives to log, such as ``all_reduce``."""
    verbose: bool = False
    """Write a line per call, beside the summary."""
    debug: bool = False
    """Name the caller of each collective in its line."""


class FlopsProfilerSection(Section):
    """Counts operations and parameters of each module, and the time of its forward, at one step."""

    source = "spec/core.md 2.12"
    comes_with = "ds-core"

    enabled: bool = False
    """Profile one step."""
    recompute_fwd_factor: Annotated[Number, Field(ge=0)] = 0.0
    """Forwards that backward runs again, as a share of one; 1.0 where all activations are checkpointed."""
    profile_step: Count = 1
    """Optimizer step that is profiled."""
    module_depth: Annotated[Int, Field(ge=-1)] = -1
    """Depth down to which modules are summed up; -1 is the deepest."""
    top_modules: Count = 1
    """Modules named at each depth, the largest ones."""
    detailed: bool = True
    """Print the whole model with the numbers of each module."""
    output_file: str | None = None
    """File of the report; null prints it."""


class ThroughputTimerSection(Section):
    """Measures samples per second for the lines of ``steps_per_print``."""

    enabled: bool = True
    """Measure it."""
    synchronized: bool = True
    """Wait for the device before the clock is read."""


class TimersSection(Section):
    """The engine's own clocks."""

    source = "spec/core.md 2.13"
    comes_with = "ds-core"

    throughput: ThroughputTimerSection = Field(default_factory=ThroughputTimerSection)
    """Samples per second."""
