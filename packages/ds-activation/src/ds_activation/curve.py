"""The time and the memory of every policy, from one profile: what ``ds activation profile`` prints and draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ds_activation.choice import Decision, decide, least_peak, predict, solve

if TYPE_CHECKING:
    from ds_activation.choice import Choice, ModelProfile

__all__ = ["Point", "policies"]

INTERVALS = (2, 3, 4)
"""Of ``every_n``."""
BUDGETS = 9
"""Of ``auto``, in equal steps from the least possible to all."""


class Point(NamedTuple):
    """What a policy leads to."""

    policy: str
    choice: Choice


def policies(profile: ModelProfile, budget_bytes: int | None = None) -> list[Point]:
    """Return what policies lead to: none, those without a budget, and ``auto`` for several budgets.

    Args:
        profile: of one forward.
        budget_bytes: of ``auto``; None: several between the least possible and what everything takes.

    Raises:
        ConfigError: ``budget_bytes`` is below the least possible.
    """
    count = len(profile.blocks)
    found = [Point("none", predict(profile, (Decision.KEEP,) * count))]
    if all(Decision.SELECTIVE in call.costs for call in profile.calls):
        found.append(Point("selective", predict(profile, decide("selective", count, 1))))
    intervals = [interval for interval in INTERVALS if interval <= count]
    found += [Point(f"every_n, {n}", predict(profile, decide("every_n", count, n))) for n in reversed(intervals)]
    found.append(Point("full", predict(profile, decide("full", count, 1))))
    budgets = _budgets(profile, found[0].choice.peak_bytes) if budget_bytes is None else [budget_bytes]
    found += [Point(f"auto, {_mib(budget)}", solve(profile, budget)) for budget in budgets]
    return found


def _budgets(profile: ModelProfile, most: int) -> list[int]:
    least = least_peak(profile)
    steps = range(BUDGETS) if most > least else range(1)
    return [most - (most - least) * step // (BUDGETS - 1) for step in steps]


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f} MiB"
