"""What policies keep, and the choice of ``auto``: arithmetic over a profile, without torch.

A profile is a forward as a sequence: what the rest of the model saves, a call of a block, the rest again, and so on.
Autograd runs backward in exactly the reverse of that order. So while block ``i`` is at work in backward, what is held
is what was held when it ended in forward, and what it computes again or fetches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from ds_activation.walk import CAP, Path, Walk
from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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
    slack_bytes: int = 0
    """No choice that stays this much below the budget takes less time; 0: none within the budget does."""
    is_per_block: bool = True
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
    best = min(Walk(profile, None, CAP).run(lambda peak, _, now: max(peak, now)), key=lambda pair: pair[1])
    return predict(profile, _decisions(profile, best[2]))


def solve(profile: ModelProfile, budget_bytes: int, *, cap: int = CAP) -> Choice:
    """Return the decisions of the least extra time whose peak is within the budget.

    The blocks are gone through in order with the set of (bytes so far, extra seconds) that no other pair beats, apart
    for what is counted already of the storages that come again. Exact, unless pairs had to be merged
    (``Choice.slack_bytes``) or blocks called several times had to decide alike (``Choice.is_per_block``).

    Args:
        profile: of one forward.
        budget_bytes: of saved activations.
        cap: pairs above which those close to each other are merged.

    Raises:
        ConfigError: no decisions stay within the budget.
    """
    walk = Walk(profile, budget_bytes, cap)
    found = walk.run(lambda seconds, more, _: seconds + more)
    if not found:
        least = _least(profile)
        if least.peak_bytes <= budget_bytes:  # merged away
            return replace(least, slack_bytes=walk.slack_bytes, is_per_block=walk.is_per_block)
        raise ConfigError(
            f"saved activations take at least {least.peak_bytes} bytes with the blocks given, "
            f"the budget is {budget_bytes}",
            where="activation_checkpointing.memory_budget",
            fix="raise it, choose smaller modules, or lower train_micro_batch_size_per_gpu",
        )
    best = min(found, key=lambda pair: (pair[1], pair[0]))
    choice = predict(profile, _decisions(profile, best[2]))
    return replace(choice, slack_bytes=walk.slack_bytes, is_per_block=walk.is_per_block)


def _decisions(profile: ModelProfile, path: Path) -> tuple[Decision, ...]:
    # A block that was not called says nothing about itself; recomputing is safe.
    decisions = [Decision.RECOMPUTE] * len(profile.blocks)
    while path is not None:
        block, decision, path = path
        decisions[block] = decision
    return tuple(decisions)
