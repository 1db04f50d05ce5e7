"""What the picture of ``ds activation profile`` shows: the curve of the policies, and bars of each block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ds_activation.choice import Call, Cost, Decision, Held, ModelProfile
from ds_activation.curve import BUDGETS, Point, policies
from ds_activation.plot import draw
from ds_activation.report import costs_of_blocks

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("matplotlib")

MIB = 2**20


def profile(blocks: int) -> ModelProfile:
    """Return blocks of which each saves a MiB more than the one before, and takes a millisecond longer."""
    calls = []
    for at in range(blocks):
        kept = Held(frozenset(), (1 + at) * MIB)
        calls.append(
            Call(at, {Decision.KEEP: Cost(kept, kept), Decision.RECOMPUTE: Cost(Held(), kept, 0.001 * (1 + at))})
        )
    return ModelProfile(tuple(f"h.{at}" for at in range(blocks)), (), tuple(calls), (frozenset[int](),) * (blocks + 1))


def drawn(found: ModelProfile, points: list[Point], path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the figure that :func:`draw` has written and closed."""
    import matplotlib.pyplot as plt

    closed: list[Any] = []
    close = plt.close
    monkeypatch.setattr(plt, "close", lambda figure: (closed.append(figure), close(figure)))
    draw(found, points, path)
    (figure,) = closed
    assert plt.get_fignums() == []
    return figure


def test_the_curve_and_the_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = profile(4)
    points = policies(found)
    figure = drawn(found, points, tmp_path / "curve.png", monkeypatch)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    curve, saved, again = figure.axes
    auto, *others = curve.lines
    choices = [point.choice for point in points if point.policy.startswith("auto")]
    assert len(choices) == BUDGETS
    assert list(auto.get_xdata()) == pytest.approx([1000 * choice.extra_seconds for choice in choices])
    assert list(auto.get_ydata()) == pytest.approx([choice.peak_bytes / MIB for choice in choices])
    named = {point.policy: point.choice for point in points if not point.policy.startswith("auto")}
    assert (
        [text.get_text() for text in curve.texts]
        == list(named)
        == ["none", "every_n, 4", "every_n, 3", "every_n, 2", "full"]
    )
    places = [(line.get_xdata()[0], line.get_ydata()[0]) for line in others]
    assert places == [(pytest.approx(1000 * one.extra_seconds), one.peak_bytes / MIB) for one in named.values()]
    assert ("ms" in curve.get_xlabel(), "MiB" in curve.get_ylabel()) == (True, True)
    costs = costs_of_blocks(found)
    assert [bar.get_height() for bar in saved.patches] == [nbytes / MIB for nbytes in costs.saved_bytes] == [1, 2, 3, 4]
    assert [bar.get_height() for bar in again.patches] == pytest.approx([1, 2, 3, 4])
    assert (saved.get_ylabel(), again.get_ylabel()) == ("saved, MiB", "computed again, ms")
    for bars in (saved, again):
        assert [label.get_text() for label in bars.get_xticklabels()] == ["h.0", "h.1", "h.2", "h.3"]


def test_of_many_blocks_every_one_has_bars_and_some_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = profile(30)
    points = [point for point in policies(found) if point.policy in ("none", "full")]
    _, saved, again = drawn(found, points, tmp_path / "curve.png", monkeypatch).axes
    assert len(saved.patches) == len(again.patches) == 30
    assert [label.get_text() for label in saved.get_xticklabels()] == [f"h.{at}" for at in range(0, 30, 3)]
