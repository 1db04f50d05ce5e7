"""Contract of the seam ``monitor``; inherit :class:`MonitorContract` in a plugin's tests."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ds_core.interfaces.monitor import Event, Monitor

__all__ = ["MonitorContract"]

EVENTS: list[Event] = [
    ("Train/Samples/train_loss", 5.5, 8),
    ("Train/Samples/lr", 1e-3, 8),
    ("Train/Samples/train_loss", 2.25, 16),
    ("Train/Samples/lr", 0.1 + 0.2, 16),
]


class MonitorContract:
    """What every monitor promises. Override both methods."""

    def build(self, folder: Path) -> Monitor:
        """Override: return an enabled monitor that writes below ``folder``."""
        raise NotImplementedError

    def read(self, folder: Path) -> Iterable[Event]:
        """Override: return what a reader of ``folder`` sees, as (name, value, step), in any order of the names.

        A name may come back changed (as ``Train_Samples_lr``), as long as different names stay different.
        """
        raise NotImplementedError

    def test_events_are_seen_on_return(self, tmp_path: Path) -> None:
        """Not only after ``close``: what the operating system has outlives a crash of this process."""
        monitor = self.build(tmp_path)
        monitor.write_events(EVENTS[:2])
        assert self._series(tmp_path) == _series(EVENTS[:2])
        monitor.write_events(EVENTS[2:])
        assert self._series(tmp_path) == _series(EVENTS)
        monitor.close()
        assert self._series(tmp_path) == _series(EVENTS)

    def test_a_run_that_goes_on_appends(self, tmp_path: Path) -> None:
        for part in (EVENTS[:2], EVENTS[2:]):
            monitor = self.build(tmp_path)
            monitor.write_events(part)
            monitor.close()
        assert self._series(tmp_path) == _series(EVENTS)

    def test_no_events_are_no_error(self, tmp_path: Path) -> None:
        monitor = self.build(tmp_path)
        monitor.write_events([])
        monitor.close()
        assert list(self.read(tmp_path)) == []

    def test_values_that_are_no_numbers_any_more(self, tmp_path: Path) -> None:
        """A loss that diverged is what a user most wants to see."""
        monitor = self.build(tmp_path)
        monitor.write_events([("loss", math.inf, 1), ("loss", math.nan, 2), ("loss", -math.inf, 3)])
        monitor.close()
        values = [value for _, value, _ in sorted(self.read(tmp_path), key=lambda event: event[2])]
        assert values[0] == math.inf
        assert math.isnan(values[1])
        assert values[2] == -math.inf

    def test_any_name_is_written(self, tmp_path: Path) -> None:
        names = ["plain", "a/b/c", "with space", "\u00fcml\u00e4ut", 'comma,quote"', "dot.s", "../up"]
        monitor = self.build(tmp_path / "inside")
        monitor.write_events([(name, float(index), 1) for index, name in enumerate(names)])
        monitor.close()
        assert sorted(value for _, value, _ in self.read(tmp_path / "inside")) == [float(i) for i in range(len(names))]
        assert [path.name for path in tmp_path.iterdir()] == ["inside"], "nothing is written elsewhere"

    def test_close_can_be_repeated(self, tmp_path: Path) -> None:
        monitor = self.build(tmp_path)
        monitor.close()
        monitor.close()

    def test_two_monitors_do_not_mix(self, tmp_path: Path) -> None:
        first, second = self.build(tmp_path / "first"), self.build(tmp_path / "second")
        first.write_events(EVENTS[:1])
        second.write_events(EVENTS[1:])
        first.close()
        second.write_events(EVENTS[:1])
        second.close()
        assert self._series(tmp_path / "first") == _series(EVENTS[:1])
        assert self._series(tmp_path / "second") == _series([*EVENTS[1:], EVENTS[0]])

    def _series(self, folder: Path) -> list[list[tuple[float, int]]]:
        return _series(self.read(folder))


def _series(events: Iterable[Event]) -> list[list[tuple[float, int]]]:
    """Return (value, step) of each name in the order written, without the names, which a monitor may change."""
    found: dict[str, list[tuple[float, int]]] = {}
    for name, value, step in events:
        found.setdefault(name, []).append((value, step))
    return sorted(found.values())
