"""Events as CSV files, one per event name."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ds_core.errors import ConfigError
from ds_core.interfaces.monitor import Monitor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ds_core.interfaces.monitor import Event

__all__ = ["CsvMonitor"]


class CsvMonitor(Monitor):
    """Appends to ``{output_path}/{job_name}/{event name}.csv``, the name's ``/`` and spaces written as ``_``.

    The first line is ``step,<last part of the name>``; a run that goes on writes no second one. An empty
    ``output_path`` is the working directory.

    Args:
        section: has ``enabled``, ``output_path`` and ``job_name``. While not enabled, nothing is written.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, section: Any) -> None:
        self.enabled = bool(section.enabled)
        self.folder = Path(section.output_path) / section.job_name
        self._files: dict[Path, TextIO] = {}
        if self.enabled:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"the folder of the CSV files cannot be made: {error}",
                    where="csv_monitor.output_path",
                    fix="name a folder that this user may write to",
                ) from error

    def write_events(self, events: Sequence[Event]) -> None:
        """Append one row per event; on return the rows are with the operating system."""
        if not self.enabled:
            return
        touched = {}
        for name, value, step in events:
            file = self._file(name)
            csv.writer(file, lineterminator="\n").writerow([step, float(value)])
            touched[file.fileno()] = file
        for file in touched.values():
            file.flush()

    def close(self) -> None:
        """Close the files. A later :meth:`write_events` opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def _file(self, name: str) -> TextIO:
        path = self.folder / (name.replace("/", "_").replace(" ", "_") + ".csv")
        if path not in self._files:
            file = path.open("a", encoding="utf-8", newline="")
            if file.tell() == 0:  # at the end: an empty file has no header yet
                csv.writer(file, lineterminator="\n").writerow(["step", name.rpartition("/")[2]])
            self._files[path] = file
        return self._files[path]
