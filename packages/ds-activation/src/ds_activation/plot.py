"""The curve of time and memory as a picture; needs matplotlib, which is imported only here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_activation.report import costs_of_blocks
from ds_core.errors import MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ds_activation.choice import ModelProfile
    from ds_activation.curve import Point

__all__ = ["check_matplotlib", "draw"]


def check_matplotlib() -> None:
    """Raise before anything long has been done.

    Raises:
        MissingPackageError: it is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError(
            "a picture needs matplotlib", where="ds activation profile --png", fix="pip install matplotlib"
        )


def draw(profile: ModelProfile, points: Sequence[Point], path: Path) -> None:
    """Write a PNG: memory of the policies over their time, ``auto`` as a line; what blocks save, and take again."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    axes = figure.add_subplot(grid[:, 0])
    auto = [point for point in points if point.policy.startswith("auto")]
    axes.plot(*_places(auto), marker=".", color="tab:blue", label="auto, by budget")
    for point in points:
        if point not in auto:
            [at], [mib] = _places([point])
            axes.plot(at, mib, "o", color="tab:orange")
            axes.annotate(point.policy, (at, mib), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel("extra time of a step, ms")
    axes.set_ylabel("saved activations at their peak, MiB")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    costs = costs_of_blocks(profile)
    for row, (values, what) in enumerate(
        (
            ([nbytes / 2**20 for nbytes in costs.saved_bytes], "saved, MiB"),
            ([1000 * seconds for seconds in costs.again_seconds], "computed again, ms"),
        )
    ):
        bars = figure.add_subplot(grid[row, 1])
        bars.bar(range(len(values)), values, color="tab:gray")
        bars.set_ylabel(what)
        # Names of many blocks would cover each other.
        step = -(-len(values) // 12)
        bars.set_xticks(range(0, len(values), step), profile.blocks[::step], rotation=60, ha="right", fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _places(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [1000 * point.choice.extra_seconds for point in points], [
        point.choice.peak_bytes / 2**20 for point in points
    ]
