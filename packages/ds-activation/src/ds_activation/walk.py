"""The way of the solver through a profile: in the order of the calls, with all that may still be the best."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ds_activation.choice import Decision, ModelProfile

__all__ = ["CAP", "Pair", "Path", "Walk"]

CAP = 4_000
"""Pairs of bytes and seconds that the solver keeps at a time; above, it merges."""
MERGED = 0.01
"""Merging moves no pair by more than this part of the bytes between the least and the most, over all blocks."""
GROUPS = 64
"""Sets of storages counted so far that are told apart."""
FREE_UNITS = 6
"""Blocks that are called again later, each with a decision of its own; of more, all take the same."""


Path = Any
"""``(block, decision, path before)``, or None at the start."""
Pair = tuple[int, float, Path]
"""Bytes held so far, what is to be least so far, and how that came."""
_Key = Any
"""Storages that are counted and come again; decisions of blocks that come again."""


class Walk:
    """One way through the calls of a profile, with all pairs that may still be the best.

    Args:
        profile: of one forward.
        limit: of the bytes at any point; None: there is none.
        cap: pairs above which those close to each other are merged.

    Attributes:
        slack_bytes: no way that stays this much below the limit has a better value than those found.
        is_per_block: whether every block has a decision of its own.
    """

    def __init__(self, profile: ModelProfile, limit: int | None, cap: int) -> None:
        self.profile, self.limit, self.cap = profile, limit, cap
        self.slack_bytes = 0
        self._later = _later(profile)
        self._last = {call.block: at for at, call in enumerate(profile.calls)}
        again = {call.block for at, call in enumerate(profile.calls) if self._last[call.block] != at}
        self.is_per_block = len(again) <= FREE_UNITS
        # A number below 0 is no block: the decision of all that come again.
        self._unit = {block: block if self.is_per_block else -1 for block in again}
        if not self.is_per_block:
            self._last_of_all = max(self._last[block] for block in again)

    def run(self, value: Callable[[float, float, int], float]) -> list[Pair]:
        """Return the pairs at the end.

        Args:
            value: of the value before, the extra seconds of a call, and the bytes while it is at work: the value
                after it.
        """
        groups: dict[_Key, list[Pair]] = {(frozenset(), frozenset()): [(0, 0.0, None)]}
        for at in range(len(self.profile.calls)):
            groups = self._step(at, groups, value)
        end: list[Pair] = []
        for (counted, _), pairs in groups.items():
            more = self.profile.bytes_of(self.profile.rest[-1] - counted)
            end += [
                (pair[0] + more, value(pair[1], 0.0, pair[0] + more), pair[2])
                for pair in pairs
                if self._fits(pair[0] + more)
            ]
        return end

    def _step(
        self, at: int, groups: Mapping[_Key, list[Pair]], value: Callable[[float, float, int], float]
    ) -> dict[_Key, list[Pair]]:
        profile, call, later = self.profile, self.profile.calls[at], self._later[at + 1]
        unit = self._unit.get(call.block)
        found: dict[_Key, list[Pair]] = defaultdict(list)
        for (before, taken), pairs in groups.items():
            counted = before | profile.rest[at]
            rest = profile.bytes_of(profile.rest[at] - before)
            must = dict(taken).get(unit) if unit is not None else None
            for decision, cost in call.costs.items():
                if must not in (None, decision):
                    continue
                at_work = rest + cost.at_work.own_bytes + profile.bytes_of(cost.at_work.shared - counted)
                more = rest + cost.held.own_bytes + profile.bytes_of(cost.held.shared - counted)
                now_taken = taken if unit is None else self._taken(taken, unit, decision, at)
                found[(counted | cost.held.shared) & later, now_taken] += [
                    (held + more, value(worth, cost.seconds, held + at_work), (call.block, decision, path))
                    for held, worth, path in pairs
                    if self._fits(held + at_work) and self._fits(held + more)
                ]
        return self._fewer({key: _undominated(pairs) for key, pairs in found.items() if pairs})

    def _fits(self, held: int) -> bool:
        return self.limit is None or held <= self.limit

    def _taken(
        self, taken: frozenset[tuple[int, Decision]], unit: int, decision: Decision, at: int
    ) -> frozenset[tuple[int, Decision]]:
        last = self._last_of_all if unit < 0 else self._last[unit]
        return taken - {(unit, decision)} if at == last else taken | {(unit, decision)}

    def _fewer(self, groups: dict[_Key, list[Pair]]) -> dict[_Key, list[Pair]]:
        while len({counted for counted, _ in groups}) > GROUPS:
            groups = self._forget(groups)
        if sum(map(len, groups.values())) <= self.cap:
            return groups
        held = [pair[0] for pairs in groups.values() for pair in pairs]
        width = max(1, int((max(held) - min(held)) * MERGED / len(self.profile.calls)))
        merged = groups
        # Some profiles have more calls than 1 % of the bytes has parts: wider, until it is few enough.
        while sum(map(len, merged.values())) > max(self.cap, len(groups)):
            merged = {key: _merged(pairs, width) for key, pairs in groups.items()}
            width *= 2
        self.slack_bytes += width // 2
        return merged

    def _forget(self, groups: Mapping[_Key, list[Pair]]) -> dict[_Key, list[Pair]]:
        """Take the smallest storage that groups differ in as not counted: it may count twice from here on."""
        sets = [counted for counted, _ in groups]
        differing = frozenset.union(*sets) - frozenset.intersection(*sets)
        forgotten = min(differing, key=lambda at: (self.profile.storages[at], at))
        self.slack_bytes += self.profile.storages[forgotten]
        found: dict[_Key, list[Pair]] = defaultdict(list)
        for (counted, taken), pairs in groups.items():
            found[counted - {forgotten}, taken] += pairs
        return {key: _undominated(pairs) for key, pairs in found.items()}


def _later(profile: ModelProfile) -> list[frozenset[int]]:
    """Return the storages that may be counted from each call on, the rest before it included."""
    later = [profile.rest[-1]]
    for rest, call in zip(profile.rest[-2::-1], reversed(profile.calls), strict=True):
        costs = call.costs.values()
        named = [held.shared for cost in costs for held in (cost.held, cost.at_work)]
        later.append(later[-1].union(rest, *named))
    return later[::-1]


def _undominated(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs that no other beats in both bytes and value, by bytes."""
    kept: list[Pair] = []
    for pair in sorted(pairs, key=lambda pair: pair[:2]):
        if not kept or pair[1] < kept[-1][1]:
            kept.append(pair)
    return kept


def _merged(pairs: Sequence[Pair], width: int) -> list[Pair]:
    """Return of each stretch of ``width`` bytes the pair of the best value: the last, by :func:`_undominated`."""
    first = pairs[0][0]
    return list({(pair[0] - first) // width: pair for pair in pairs}.values())
