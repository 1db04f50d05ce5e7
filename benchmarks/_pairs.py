"""Times two contenders in turn and says how they compare: the pairs, the interval of their median, and the bar.

Note: why pairs
    A shared machine drifts: clocks change, neighbours come and go. So the two contenders run one after the other, many
    times, and only the two times of one pair are compared. The order alternates (A B, B A, A B, ...), so that a steady
    drift makes half of the ratios too large and half too small, and the median stays.

Note: the interval
    The pairwise ratios are taken as independent draws from one distribution with median m; nothing else is assumed of
    it. The number of ratios below m is then binomial, Bin(n, 1/2), and the k-th smallest and k-th largest enclose m
    with probability c(k) = P(k <= Bin(n, 1/2) <= n - k). For n = 15 this is 0.965 at k = 4 and 0.882 at k = 5: no k
    gives 0.90, and k = 4 would be a wider interval than the bar's rule speaks of, hence a milder rule. So each end
    lies between the k-th and the (k+1)-th value, by the weight of Hettmansperger and Sheather ("Confidence intervals
    based on interpolated order statistics", Statistics & Probability Letters 4, 1986):

        i = (c(k) - 0.90) / (c(k) - c(k+1)),    weight of the inner value = (n - k) i / (k + (n - 2k) i)

    It is exact for a double-exponential distribution and off by less than 0.01 for normal, uniform and Cauchy ones.
    With fewer than 5 samples even the extremes miss 0.90; they are given then, with the probability they do reach.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["CONFIDENCE", "MIN_PAIRS", "Bar", "Coordinator", "Interval", "PairTimes", "median_interval", "time_pairs"]

CONFIDENCE = 0.90
MIN_PAIRS = 15


@dataclass(frozen=True)
class Interval:
    """A median and the interval that encloses it with probability ``confidence``."""

    median: float
    lower: float
    upper: float
    confidence: float
    count: int

    @classmethod
    def exact(cls, value: float) -> Interval:
        """Return the interval of a number that does not vary, such as a count of bytes."""
        return cls(value, value, value, 1.0, 1)


def _coverage(count: int, k: int) -> float:
    """Return P(k <= Bin(count, 1/2) <= count - k), the chance that the k-th from both ends enclose the median."""
    return math.fsum(math.comb(count, j) / 2**count for j in range(k, count - k + 1))


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the median of ``samples`` and its interval; see "Note: the interval".

    Args:
        samples: at least one, finite, in any order.
        confidence: between 0 and 1, both excluded.

    Raises:
        ValueError: there are no samples, one is not finite, or ``confidence`` is out of range.
    """
    if not samples or not all(math.isfinite(sample) for sample in samples):
        raise ValueError(f"need at least one sample, all finite; got {list(samples)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    ordered = sorted(samples)
    count = len(ordered)
    median = statistics.median(ordered)
    # The largest k that still covers; 0 when even the two extremes do not.
    k = max((k for k in range(1, count // 2 + 1) if _coverage(count, k) >= confidence), default=0)
    if k == 0:
        return Interval(median, ordered[0], ordered[-1], _coverage(count, 1) if count > 1 else 0.0, count)
    outer, inner = _coverage(count, k), _coverage(count, k + 1)
    i = (outer - confidence) / (outer - inner)
    weight = (count - k) * i / (k + (count - 2 * k) * i)
    lower = _between(ordered[k - 1], ordered[k], weight)
    upper = _between(ordered[count - k], ordered[count - k - 1], weight)
    # Rounding, or k at the very middle, must not leave the median outside.
    return Interval(median, min(lower, median), max(upper, median), confidence, count)


def _between(outer: float, inner: float, weight: float) -> float:
    return outer + (inner - outer) * weight


@dataclass(frozen=True)
class Bar:
    """A limit and the rule that says when it is met.

    The rule: the lower end of the interval is at most ``limit`` and the median at most ``limit + slack``, from at least
    ``min_count`` samples. So noise alone does not miss a bar, and a median well above it always does.
    """

    limit: float
    slack: float = 0.05
    min_count: int = MIN_PAIRS

    def met(self, result: Interval) -> bool | None:
        """Return the verdict, or None where there are too few samples for one."""
        if result.count < self.min_count:
            return None
        return result.lower <= self.limit and result.median <= self.limit + self.slack


@dataclass(frozen=True)
class PairTimes:
    """Seconds per turn of both contenders, in the order of the pairs."""

    ours: list[float]
    peer: list[float]

    @property
    def ratios(self) -> list[float]:
        return [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]

    @property
    def differences(self) -> list[float]:
        return [ours - peer for ours, peer in zip(self.ours, self.peer, strict=True)]


class Coordinator(Protocol):
    """What keeps several ranks in step while they time; ``_ranks.Ranks`` is one."""

    def align(self) -> None:
        """Return once every rank is here and its device has nothing left to do."""

    def finish(self) -> None:
        """Return once this rank's device has nothing left to do."""

    def slowest(self, seconds: float) -> float:
        """Return the largest ``seconds`` of all ranks, on all ranks."""


def time_pairs(
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    pairs: int,
    warmup: int,
    ranks: Coordinator,
    clock: Callable[[], float] = time.perf_counter,
) -> PairTimes:
    """Time ``ours`` and ``peer`` in turn. Every rank must call it, with equal counts.

    All ranks start a turn together, and a turn lasts until the slowest rank has finished it.

    Args:
        ours: runs one turn of the first contender, the same work at each call.
        peer: runs one turn of the second.
        pairs: how many pairs are timed.
        warmup: turns of each before the first timed one.
        ranks: keeps the ranks in step.
        clock: seconds, from any start.
    """

    def turn(contender: Callable[[], object]) -> float:
        ranks.align()
        start = clock()
        contender()
        ranks.finish()
        return ranks.slowest(clock() - start)

    for _ in range(warmup):
        turn(ours)
        turn(peer)
    times = PairTimes([], [])
    for pair in range(pairs):
        if pair % 2 == 0:
            times.ours.append(turn(ours))
            times.peer.append(turn(peer))
        else:
            times.peer.append(turn(peer))
            times.ours.append(turn(ours))
    return times
