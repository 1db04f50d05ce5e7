"""What a benchmark found: rows with a verdict, as a table for people and as JSON for machines."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _pairs import CONFIDENCE, Bar, Interval, PairTimes, median_interval

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

__all__ = [
    "Row",
    "add_output_arguments",
    "difference_row",
    "exact_ratio_row",
    "finish",
    "interval_text",
    "limit_row",
    "machine_facts",
    "ratio_row",
]


@dataclass(frozen=True)
class Row:
    """One comparison or one measured limit."""

    name: str
    unit: str
    """Of ``ours`` and ``peer``."""
    ours: Interval
    peer: Interval | None
    result: Interval
    """What the bar speaks of: a ratio, a difference, or ``ours`` itself."""
    result_unit: str
    """``x`` for a ratio."""
    bar: Bar | None
    """None: for information."""
    samples: Mapping[str, Sequence[float]]

    @property
    def met(self) -> bool | None:
        """True, False, or None where there is no bar or too few samples to say."""
        return self.bar.met(self.result) if self.bar else None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "samples": {key: list(values) for key, values in self.samples.items()}, "met": self.met}


def ratio_row(name: str, times: PairTimes, bar: Bar | None, *, unit: str = "s") -> Row:
    """Return the row of ours / peer, pair by pair."""
    samples = {"ours": times.ours, "peer": times.peer}
    ours, peer = median_interval(times.ours), median_interval(times.peer)
    return Row(name, unit, ours, peer, median_interval(times.ratios), "x", bar, samples)


def difference_row(name: str, times: PairTimes, bar: Bar | None, *, scale: float, unit: str) -> Row:
    """Return the row of ours - peer, pair by pair; times are multiplied by ``scale`` to get ``unit``."""
    scaled = PairTimes([value * scale for value in times.ours], [value * scale for value in times.peer])
    samples = {"ours": scaled.ours, "peer": scaled.peer}
    ours, peer = median_interval(scaled.ours), median_interval(scaled.peer)
    return Row(name, unit, ours, peer, median_interval(scaled.differences), unit, bar, samples)


def exact_ratio_row(name: str, ours: float, peer: float, bar: Bar | None, *, unit: str) -> Row:
    """Return the row of ours / peer for two numbers that do not vary."""
    samples = {"ours": [ours], "peer": [peer]}
    return Row(name, unit, Interval.exact(ours), Interval.exact(peer), Interval.exact(ours / peer), "x", bar, samples)


def limit_row(name: str, values: Sequence[float], limit: float | None, *, unit: str) -> Row:
    """Return the row of one measured quantity; its median must not be above ``limit``."""
    found = median_interval(values)
    bar = None if limit is None else Bar(limit, slack=0.0, min_count=1)
    return Row(name, unit, found, None, found, unit, bar, {"ours": list(values)})


def machine_facts() -> dict[str, Any]:
    """Return what timings depend on. No host, user or path name is among it."""
    import torch
    from _ranks import usable_cores

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ds_core": metadata.version("ds-core"),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` and ``--strict``, which :func:`finish` reads."""
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="also write machine, settings, rows and samples there"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 unless every bar is met (default: always 0)")


def finish(title: str, rows: Sequence[Row], settings: Mapping[str, Any], arguments: argparse.Namespace) -> int:
    """Print the table, write the JSON if asked, and return the exit code."""
    machine = machine_facts()
    _print_table(title, rows, machine)
    judged = [row.met for row in rows if row.bar]
    # One bar missed is a miss; one that could not be judged leaves the whole open.
    met = False if False in judged else None if None in judged else True
    if arguments.json:
        document = {
            "benchmark": title,
            "machine": machine,
            "settings": dict(settings),
            "rows": [row.as_json() for row in rows],
            "met": met,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if arguments.strict and met is not True else 0


def _print_table(title: str, rows: Sequence[Row], machine: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    facts = [machine["cpu"], f"{machine['cores']} cores", *machine["gpus"], f"torch {machine['torch']}"]
    has_peer = any(row.peer for row in rows)
    table = Table(title=title, caption=", ".join(facts))
    table.add_column("what")
    table.add_column("ours", justify="right")
    if has_peer:
        table.add_column("peer", justify="right")
        table.add_column("ours vs peer", justify="right")
    table.add_column("90 % interval", justify="right")
    table.add_column("samples", justify="right")
    table.add_column("bar", justify="right")
    table.add_column("verdict")
    for row in rows:
        cells = [row.name, f"{row.ours.median:.4g} {row.unit}"]
        if has_peer:
            cells += [
                f"{row.peer.median:.4g} {row.unit}" if row.peer else "",
                f"{row.result.median:.4g} {row.result_unit}",
            ]
        bar = f"{row.bar.limit:g} {row.result_unit}" if row.bar else ""
        table.add_row(*cells, interval_text(row.result), str(row.result.count), bar, _verdict(row))
    # A pipe has no width of its own; 80 columns would fold every cell.
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def interval_text(found: Interval) -> str:
    """Return an interval for people, with its confidence where that is not what the column's title says."""
    if found.confidence == 1.0:
        return "exact"
    if found.count == 1:
        return "one sample"
    reached = "" if found.confidence == CONFIDENCE else f" ({found.confidence:.0%})"
    return f"{found.lower:.4g} .. {found.upper:.4g}{reached}"


def _verdict(row: Row) -> str:
    if row.bar is None:
        return ""
    return {True: "[green]met[/]", False: "[red]missed[/]", None: f"[yellow]open: under {row.bar.min_count}[/]"}[
        row.met
    ]
