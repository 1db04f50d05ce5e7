"""Seam ``monitor``: writes events somewhere people look. The entry name is its config section (``csv_monitor``).

Contract: ``ds_core.testing.monitor``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ds_core.config import Section

__all__ = ["Event", "Monitor"]

Event = tuple[str, float, int]
"""(name, value, step), such as ``("Train/Samples/lr", 1e-3, 4096)``; the step counts samples."""


class Monitor(ABC):
    """One destination. Built on global rank 0 alone, and only when its section is enabled."""

    def __init__(self, section: Section) -> None:
        """``section``: its config section, such as ``ds_core.config.CsvMonitorSection``."""
        self.section = section

    @abstractmethod
    def write_events(self, events: Sequence[Event]) -> None:
        """Write ``events`` so that a reader sees them on return, also after a crash."""

    @abstractmethod
    def close(self) -> None:
        """Release files and connections. Safe to repeat."""
