"""What a run tells people: a progress bar while it goes, and a history file that outlives it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HISTORY_FILE = "history.jsonl"


class History:
    """The run's numbers, one JSON object a line, so that a run cut short leaves a file that still reads.

    Lines are ``{"step", "loss", "lr", "tokens_per_s", "skipped_steps"}``, ``{"step", "validation_loss"}`` and
    ``{"step", "resumed"}``.
    """

    def __init__(self, folder: Path, *, resumed_at: int | None) -> None:
        """``resumed_at``: the step of the checkpoint this run goes on from; None starts a new history."""
        folder.mkdir(parents=True, exist_ok=True)
        kept: list[dict[str, Any]] = []
        if resumed_at is not None:
            # A run that was killed after its last checkpoint has told of steps that are about to be done again.
            kept = [line for line in read_history(folder) if line["step"] <= resumed_at]
        self._file = (folder / HISTORY_FILE).open("w", encoding="utf-8")
        for line in kept:
            self._write(line)
        if resumed_at is not None:
            self.add(resumed_at, resumed=True)

    def add(self, step: int, **values: Any) -> None:
        self._write({"step": step, **values})

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def read_history(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's history; nothing if there is none."""
    path = folder / HISTORY_FILE
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


class Report:
    """Progress bar and history of one run. Without ``enabled``, as on all ranks but one, it does nothing."""

    LINE_EVERY_S = 10.0
    """Where output goes to a file instead of a terminal, a line this often stands for the bar."""

    def __init__(self, folder: Path, *, enabled: bool, start: int, total: int, is_resumed: bool) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self._history = History(folder, resumed_at=start if is_resumed else None)
        self._start, self._total = start, total
        self._begin = self._last_line = time.monotonic()
        self._training = self._validation = ""
        self._console = Console()
        columns: tuple[ProgressColumn, ...] = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("training", total=total, completed=start, numbers="")
        self._bar.start()

    def step(self, step: int, *, loss: float, lr: float, tokens_per_s: float, skipped_steps: int) -> None:
        if not self.enabled:
            return
        self._history.add(step, loss=loss, lr=lr, tokens_per_s=round(tokens_per_s), skipped_steps=skipped_steps)
        self._training = f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s"
        self._show(step)
        now = time.monotonic()
        if self._bar.disable and (now - self._last_line > self.LINE_EVERY_S or step == self._total):
            self._last_line = now
            seconds_left = (now - self._begin) / (step - self._start) * (self._total - step)
            self.say(f"step {step}/{self._total}  {self._training}{self._validation}  ETA {seconds_left:.0f} s")

    def validation(self, step: int, loss: float) -> None:
        if self.enabled:
            self._history.add(step, validation_loss=loss)
            self._validation = f"  validation {loss:.3f}"
            self._show(step)

    def say(self, text: str) -> None:
        """Print a line, above the bar while there is one."""
        if self.enabled:
            self._console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.enabled:
            self._bar.stop()
            self._history.close()

    def _show(self, step: int) -> None:
        self._bar.update(self._task, completed=step, numbers=self._training + self._validation)
