"""What policies keep, and the choice of ``auto``: arithmetic over a profile, without torch.

A profile is a forward as a sequence: what the rest of the model saves, a call of a block, the rest again, and so on.
Autograd runs backward in exactly the reverse of that order. So while block ``i`` is at work in backward, what is held
is what was held when it ended in forward, and what it computes again or fetches.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = [
    "Call",
    "Choice",
    "Cost",
    "Decision",
    "Held",
    "ModelProfile",
    "decide",
    "least_peak",
    "merge",
    "predict",
    "solve",
]

CAP = 20_000
"""Pairs of bytes and seconds that the solver keeps at a time; above, it merges."""
MERGED = 0.01
"""Merging moves no pair by more than this part of the bytes between the least and the most, over all blocks."""
GROUPS = 64
"""Sets of storages counted so far that are told apart."""
FREE_UNITS = 6
"""Blocks that are called again later, each with a decision of its own; of more, all take the same."""


class Decision(Enum):
    """What happens to the activations of a block."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    SELECTIVE = "selective"
    OFFLOAD = "offload"


@dataclass(frozen=True)
class Held:
    """Storages that something holds."""

    shared: frozenset[int] = frozenset()
    """Those that others may hold as well: places in ``ModelProfile.storages``."""
    own_bytes: int = 0
    """Of all others."""


@dataclass(frozen=True)
class Cost:
    """What a call of a block costs under one decision."""

    held: Held
    """From the end of the call until backward comes to it."""
    at_work: Held
    """While backward goes through it; includes ``held``."""
    seconds: float = 0.0
    """Beyond the time of the block when it is kept."""


@dataclass(frozen=True)
class Call:
    """One call of a block; a block may have several in a forward."""

    block: int
    costs: Mapping[Decision, Cost]


@dataclass(frozen=True)
class ModelProfile:
    """What one forward saves for backward, without parameters and buffers."""

    blocks: tuple[str, ...]
    storages: tuple[int, ...]
    """Bytes of each storage that several may hold."""
    calls: tuple[Call, ...]
    rest: tuple[frozenset[int], ...]
    """What the model saves outside of blocks: before the first call, after it, ..., after the last."""

    def bytes_of(self, shared: Iterable[int]) -> int:
        """Return the bytes of the storages ``shared``."""
        return sum(self.storages[at] for at in shared)


@dataclass(frozen=True)
class Choice:
    """A decision per block, and what it leads to."""

    decisions: tuple[Decision, ...]
    saved_bytes: int
    """At the end of forward."""
    peak_bytes: int
    """The highest at the end of forward and at any point of backward."""
    extra_seconds: float
    short_bytes: int = 0
    """No choice that stays this much below the budget takes less time; 0: none within the budget does."""
    is_free: bool = True
    """Whether every block could get a decision of its own."""


def decide(policy: str, blocks: int, interval: int) -> tuple[Decision, ...]:
    """Return the decisions of a policy that needs no profile.

    >>> [decision.value for decision in decide("every_n", 5, 2)]
    ['keep', 'recompute', 'keep', 'recompute', 'keep']
    """
    if policy == "every_n":
        return tuple(Decision.KEEP if at % interval else Decision.RECOMPUTE for at in range(1, blocks + 1))
    return (Decision.SELECTIVE if policy == "selective" else Decision.RECOMPUTE,) * blocks


def predict(profile: ModelProfile, decisions: Sequence[Decision]) -> Choice:
    """Return what ``decisions``, one per block, lead to."""
    counted: set[int] = set()
    total = peak = 0
    seconds = 0.0

    def add(shared: frozenset[int]) -> int:
        more = profile.bytes_of(shared - counted)
        counted.update(shared)
        return more

    for rest, call in zip(profile.rest[:-1], profile.calls, strict=True):
        total += add(rest)
        cost = call.costs[decisions[call.block]]
        peak = max(peak, total + cost.at_work.own_bytes + profile.bytes_of(cost.at_work.shared - counted))
        total += cost.held.own_bytes + add(cost.held.shared)
        seconds += cost.seconds
    total += add(profile.rest[-1])
    return Choice(tuple(decisions), total, max(peak, total), seconds)


def merge(profiles: Sequence[ModelProfile]) -> ModelProfile | None:
    """Return the element-wise maximum of the ranks' profiles, or None where the ranks did not do the same."""
    first = profiles[0]
    if any(_structure(profile) != _structure(first) for profile in profiles):
        return None
    calls = []
    for same in zip(*(profile.calls for profile in profiles), strict=True):
        costs = {decision: _highest([call.costs[decision] for call in same]) for decision in same[0].costs}
        calls.append(Call(same[0].block, costs))
    storages = tuple(map(max, zip(*(profile.storages for profile in profiles), strict=True)))
    return replace(first, storages=storages, calls=tuple(calls))


def _structure(profile: ModelProfile) -> tuple[Any, ...]:
    calls = [
        (call.block, [(decision, cost.held.shared, cost.at_work.shared) for decision, cost in call.costs.items()])
        for call in profile.calls
    ]
    return profile.blocks, len(profile.storages), profile.rest, calls


def _highest(costs: Sequence[Cost]) -> Cost:
    def highest(held: list[Held]) -> Held:
        return Held(held[0].shared, max(one.own_bytes for one in held))

    return Cost(
        highest([cost.held for cost in costs]),
        highest([cost.at_work for cost in costs]),
        max(cost.seconds for cost in costs),
    )


def least_peak(profile: ModelProfile) -> int:
    """Return the least ``peak_bytes`` that any decisions lead to."""
    return _least(profile).peak_bytes


def _least(profile: ModelProfile) -> Choice:
    best = min(_Walk(profile, None, CAP).run(lambda peak, _, now: max(peak, now)), key=lambda pair: pair[1])
    return predict(profile, _decisions(profile, best[2]))


def solve(profile: ModelProfile, budget_bytes: int, *, cap: int = CAP) -> Choice:
    """Return the decisions of the least extra time whose peak is within the budget.

    The blocks are gone through in order with the set of (bytes so far, extra seconds) that no other pair beats, apart
    for what is counted already of the storages that come again. Exact, unless pairs had to be merged
    (``Choice.short_bytes``) or blocks called several times had to decide alike (``Choice.is_free``).

    Args:
        profile: of one forward.
        budget_bytes: of saved activations.
        cap: pairs above which those close to each other are merged.

    Raises:
        ConfigError: no decisions stay within the budget.
    """
    walk = _Walk(profile, budget_bytes, cap)
    found = walk.run(lambda seconds, cost, _: seconds + cost.seconds)
    if not found:
        least = _least(profile)
        if least.peak_bytes <= budget_bytes:  # merged away
            return replace(least, short_bytes=walk.short_bytes, is_free=walk.is_free)
        raise ConfigError(
            f"saved activations take at least {least.peak_bytes} bytes with the blocks given, "
            f"the budget is {budget_bytes}",
            where="activation_checkpointing.memory_budget",
            fix="raise it, choose smaller modules, or lower train_micro_batch_size_per_gpu",
        )
    best = min(found, key=lambda pair: (pair[1], pair[0]))
    choice = predict(profile, _decisions(profile, best[2]))
    return replace(choice, short_bytes=walk.short_bytes, is_free=walk.is_free)


_Path = Any  # (block, decision, path before) or None; a recursive type that mypy need not follow
_Pair = tuple[int, float, _Path]
_Key = tuple[frozenset[int], frozenset[tuple[int, Decision]]]


class _Walk:
    """One way through the calls of a profile, with all pairs that may still be the best."""

    def __init__(self, profile: ModelProfile, limit: int | None, cap: int) -> None:
        self.profile, self.limit, self.cap = profile, limit, cap
        self.short_bytes = 0
        self._later = _later(profile)
        self._last = {call.block: at for at, call in enumerate(profile.calls)}
        again = {call.block for at, call in enumerate(profile.calls) if self._last[call.block] != at}
        self.is_free = len(again) <= FREE_UNITS
        # A number below 0 is no block: the decision of all that come again.
        self._unit = {block: block if self.is_free else -1 for block in again}
        if not self.is_free:
            self._last_of_all = max(self._last[block] for block in again)

    def run(self, value: Callable[[float, Cost, int], float]) -> list[_Pair]:
        """Return the pairs at the end.

        Args:
            value: of the value before, the cost of a call, and the bytes while it is at work: the value after it.
        """
        groups: dict[_Key, list[_Pair]] = {(frozenset(), frozenset()): [(0, 0.0, None)]}
        for at in range(len(self.profile.calls)):
            groups = self._step(at, groups, value)
        end: list[_Pair] = []
        nothing = Cost(Held(), Held())
        for (counted, _), pairs in groups.items():
            more = self.profile.bytes_of(self.profile.rest[-1] - counted)
            end += [
                (pair[0] + more, value(pair[1], nothing, pair[0] + more), pair[2])
                for pair in pairs
                if self._fits(pair[0] + more)
            ]
        return end

    def _step(
        self, at: int, groups: Mapping[_Key, list[_Pair]], value: Callable[[float, Cost, int], float]
    ) -> dict[_Key, list[_Pair]]:
        profile, call, later = self.profile, self.profile.calls[at], self._later[at + 1]
        unit = self._unit.get(call.block)
        found: dict[_Key, list[_Pair]] = defaultdict(list)
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
                    (held + more, value(worth, cost, held + at_work), (call.block, decision, path))
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

    def _fewer(self, groups: dict[_Key, list[_Pair]]) -> dict[_Key, list[_Pair]]:
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
        self.short_bytes += width // 2
        return merged

    def _forget(self, groups: Mapping[_Key, list[_Pair]]) -> dict[_Key, list[_Pair]]:
        """Take the smallest storage that groups differ in as not counted: it may count twice from here on."""
        sets = [counted for counted, _ in groups]
        differing = frozenset.union(*sets) - frozenset.intersection(*sets)
        forgotten = min(differing, key=lambda at: (self.profile.storages[at], at))
        self.short_bytes += self.profile.storages[forgotten]
        found: dict[_Key, list[_Pair]] = defaultdict(list)
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


def _undominated(pairs: Sequence[_Pair]) -> list[_Pair]:
    """Return the pairs that no other beats in both bytes and value, by bytes."""
    kept: list[_Pair] = []
    for pair in sorted(pairs, key=lambda pair: pair[:2]):
        if not kept or pair[1] < kept[-1][1]:
            kept.append(pair)
    return kept


def _merged(pairs: Sequence[_Pair], width: int) -> list[_Pair]:
    """Return of each stretch of ``width`` bytes the pair of the best value: the last, by :func:`_undominated`."""
    first = pairs[0][0]
    return list({(pair[0] - first) // width: pair for pair in pairs}.values())


def _decisions(profile: ModelProfile, path: _Path) -> tuple[Decision, ...]:
    # A block that was not called says nothing about itself; recomputing is safe.
    decisions = [Decision.RECOMPUTE] * len(profile.blocks)
    while path is not None:
        block, decision, path = path
        decisions[block] = decision
    return tuple(decisions)
