"""Observers: told of each optimizer step, they write it where people look. The engine does not know them by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_core.engine.parts import Outcome
from ds_core.log import logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ds_core.engine.parts import StepRecord
    from ds_core.interfaces.monitor import Event, Monitor

__all__ = ["MonitorObserver", "ProgressLine"]


class ProgressLine:
    """Logs a line every ``steps_per_print`` steps."""

    def __init__(self, steps_per_print: int) -> None:
        self._every = steps_per_print

    def __call__(self, record: StepRecord) -> None:
        if record.global_step % self._every == 0:
            lr = ", ".join(f"{value:.3g}" for value in record.lr)
            skipped = f", skipped={record.skipped_steps}" if record.skipped_steps else ""
            logger.info("step=%d, lr=[%s], grad_norm=%.4g%s", record.global_step, lr, record.norm, skipped)


class MonitorObserver:
    """Sends each step's events to the monitors, under DeepSpeed's names (spec/core.md section 8.5)."""

    def __init__(self, monitors: Sequence[Monitor]) -> None:
        self._monitors = list(monitors)

    def __call__(self, record: StepRecord) -> None:
        at = record.global_samples
        events: list[Event] = [("Train/Samples/grad_norm", record.norm, at)]
        if record.lr:
            events.insert(0, ("Train/Samples/lr", record.lr[0], at))
        if record.loss_scale != 1.0 or record.outcome is Outcome.SKIPPED:
            events.append(("Train/Samples/loss_scale", record.loss_scale, at))
        for monitor in self._monitors:
            monitor.write_events(events)

    def close(self) -> None:
        for monitor in self._monitors:
            monitor.close()
