"""The arithmetic of policies, and the solver (its way is walk.py) against all decisions there are."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_activation.choice import (
    Call,
    Choice,
    Cost,
    Decision,
    Held,
    ModelProfile,
    decide,
    least_peak,
    merge,
    predict,
    solve,
)
from ds_activation.walk import CAP, Walk
from ds_core.errors import ConfigError

KEEP, RECOMPUTE, SELECTIVE, OFFLOAD = Decision.KEEP, Decision.RECOMPUTE, Decision.SELECTIVE, Decision.OFFLOAD


def chain(inner: list[int], seconds: list[float], boundary: int = 10) -> ModelProfile:
    """A profile of blocks in a row: storage ``i`` is the input of block ``i``, the last one the model's output."""
    calls = []
    for at, (own, time) in enumerate(zip(inner, seconds, strict=True)):
        shared = frozenset({at})
        work = Held(shared, own)
        costs = {KEEP: Cost(work, work), RECOMPUTE: Cost(Held(shared), work, time)}
        calls.append(Call(at, costs))
    rest = (frozenset(),) * len(inner) + (frozenset({len(inner)}),)
    return ModelProfile(tuple(map(str, range(len(inner)))), (boundary,) * (len(inner) + 1), tuple(calls), rest)


def brute(profile: ModelProfile, budget: int) -> Choice | None:
    options = []
    for block in range(len(profile.blocks)):
        offered = [set(call.costs) for call in profile.calls if call.block == block]
        options.append(set.intersection(*offered) if offered else {RECOMPUTE})
    all_of_them = (predict(profile, decisions) for decisions in itertools.product(*options))
    within = [choice for choice in all_of_them if choice.peak_bytes <= budget]
    return min(within, key=lambda choice: choice.extra_seconds, default=None)


@st.composite
def profiles(draw: st.DrawFn, most: int = 5) -> ModelProfile:
    """Any sharing of storages, blocks called several times, and decisions that not all calls offer."""
    count = draw(st.integers(1, most))
    sizes = tuple(draw(st.lists(st.integers(0, 50), min_size=4, max_size=4)))
    some = st.frozensets(st.integers(0, 3), max_size=3)
    small, time = st.integers(0, 100), st.integers(0, 20).map(float)
    offered = [draw(st.sampled_from([(), (SELECTIVE,), (OFFLOAD,), (SELECTIVE, OFFLOAD)])) for _ in range(count)]
    order = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=most + 2))
    calls = []
    for block in order:
        costs = {}
        for decision in (KEEP, RECOMPUTE, *offered[block]):
            held = Held(draw(some), draw(small))
            work = Held(held.shared | draw(some), held.own_bytes + draw(small))
            costs[decision] = Cost(held, held, 0.0) if decision is KEEP else Cost(held, work, draw(time))
        calls.append(Call(block, costs))
    rest = tuple(draw(some) for _ in range(len(order) + 1))
    return ModelProfile(tuple("abcdefgh"[:count]), sizes, tuple(calls), rest)


@settings(max_examples=120, deadline=None)
@given(profiles(), st.floats(0, 1))
def test_the_choice_is_the_best_there_is(profile: ModelProfile, part: float) -> None:
    least = least_peak(profile)
    everything = predict(profile, [KEEP] * len(profile.blocks)).peak_bytes
    budget = int(least + part * max(0, everything - least))
    found, best = solve(profile, budget), brute(profile, budget)
    assert best is not None
    assert found.peak_bytes <= budget
    assert found.extra_seconds == best.extra_seconds
    assert (found.slack_bytes, found.is_per_block) == (0, True)
    assert brute(profile, least - 1) is None


@settings(max_examples=40, deadline=None)
@given(profiles(), st.floats(0, 1), st.integers(1, 4))
def test_merging_costs_no_more_than_it_says(profile: ModelProfile, part: float, cap: int) -> None:
    least = least_peak(profile)
    everything = predict(profile, [KEEP] * len(profile.blocks)).peak_bytes
    budget = int(least + part * max(0, everything - least))
    found = solve(profile, budget, cap=cap)
    assert found.peak_bytes <= budget
    with_less = brute(profile, budget - found.slack_bytes)
    assert with_less is None or found.extra_seconds <= with_less.extra_seconds


def test_merging_stays_within_five_percent_of_the_best() -> None:
    profile = doubled(12)
    budget = 80_000
    best, found = solve(profile, budget), solve(profile, budget, cap=200)
    assert best.slack_bytes == 0
    assert 0 < found.slack_bytes <= 0.02 * budget
    assert best.extra_seconds == brute(profile, budget).extra_seconds  # type: ignore[union-attr]
    assert found.extra_seconds <= 1.05 * best.extra_seconds


def doubled(count: int) -> ModelProfile:
    """Blocks of which no two sums are alike, and a second for each byte: no way through beats another."""
    sizes = [10_000 + 2**at for at in range(count)]
    return chain(sizes, [float(size) for size in sizes])


def test_at_the_cap_nothing_is_merged_and_above_it_something_is() -> None:
    profile = doubled(5)
    everything = predict(profile, [KEEP] * 5).peak_bytes
    budget = everything - 11  # nearly all ways stay within it, also before the output of 10 bytes is there
    ways = len(Walk(profile, budget, CAP).run(lambda seconds, more, _: seconds + more))
    assert ways > 2**4
    at, above = (solve(profile, budget, cap=cap) for cap in (ways, ways - 1))
    assert (at.slack_bytes, at.extra_seconds) == (0, brute(profile, budget).extra_seconds)  # type: ignore[union-attr]
    assert above.slack_bytes > 0


def test_below_and_above_the_cap_of_the_solver() -> None:
    assert 2**11 < CAP < 2**12
    for count in (11, 12):
        profile = doubled(count)
        least, most = least_peak(profile), predict(profile, [KEEP] * count).peak_bytes
        every = [predict(profile, decisions) for decisions in itertools.product((KEEP, RECOMPUTE), repeat=count)]
        for part in (0.5, 0.9, 1.0):
            budget = int(least + part * (most - least))
            found = solve(profile, budget)
            assert found.peak_bytes <= budget

            def best(within: int) -> float:
                return min(choice.extra_seconds for choice in every if choice.peak_bytes <= within)  # noqa: B023

            if count == 11 or part == 0.5:
                assert (found.slack_bytes, found.extra_seconds) == (0, best(budget))
            else:
                # Twelve blocks, and few ways that exceed the budget: more pairs than the cap.
                assert 0 < found.slack_bytes <= 0.01 * budget
                assert found.extra_seconds <= best(budget - found.slack_bytes)


def test_many_blocks_stay_at_the_cap() -> None:
    profile = doubled(18)
    pairs = Walk(profile, None, CAP).run(lambda seconds, more, _: seconds + more)
    assert len(pairs) <= CAP
    assert min(pairs, key=lambda pair: pair[1])[1] == 0.0, "that of keeping all is never merged away"


def test_a_chain_by_hand() -> None:
    profile = chain([100, 100, 100], [3.0, 1.0, 2.0])
    assert predict(profile, [KEEP] * 3) == Choice((KEEP,) * 3, 340, 340, 0.0)
    # Inputs of three blocks, the output, and while the last block is at work its inner bytes.
    assert predict(profile, [RECOMPUTE] * 3) == Choice((RECOMPUTE,) * 3, 40, 130, 6.0)
    assert solve(profile, 240).decisions == (KEEP, RECOMPUTE, KEEP)
    assert solve(profile, 340).decisions == (KEEP, KEEP, KEEP)
    # One kept block fits at the end of forward, but not beside a later one at work: so it is the last.
    assert solve(profile, 145).decisions == (RECOMPUTE, RECOMPUTE, KEEP)
    assert least_peak(profile) == 130


def test_a_budget_below_the_least_says_the_least() -> None:
    with pytest.raises(ConfigError, match="at least 130 bytes"):
        solve(chain([100, 100, 100], [3.0, 1.0, 2.0]), 129)


def test_a_block_called_twice_has_one_decision() -> None:
    profile = chain([100, 100, 100], [3.0, 1.0, 2.0])
    calls = (profile.calls[0], profile.calls[1], replace(profile.calls[2], block=0))
    twice = replace(profile, blocks=("a", "b"), calls=calls)
    found = solve(twice, 239)
    assert (found.decisions, found.extra_seconds) == ((RECOMPUTE, KEEP), 5.0)
    assert solve(twice, 240).decisions == (KEEP, RECOMPUTE)


def test_many_blocks_called_again_decide_together() -> None:
    profile = chain([100] * 16, [1.0] * 16)
    calls = tuple(replace(call, block=at % 8) for at, call in enumerate(profile.calls))
    looped = replace(profile, blocks=tuple("abcdefgh"), calls=calls)
    found = solve(looped, 1000)
    assert not found.is_per_block
    assert found.decisions == (RECOMPUTE,) * 8
    assert solve(looped, 10**6).decisions == (KEEP,) * 8


def test_more_open_storages_than_are_told_apart() -> None:
    # Skip connections: what block i saves beside its own is needed by the rest at the end, whatever is decided.
    count = 12
    calls = []
    for at in range(count):
        kept = Held(frozenset({at}), 100)
        calls.append(Call(at, {KEEP: Cost(kept, kept), RECOMPUTE: Cost(Held(), kept, 1.0 + at)}))
    late = tuple(
        Call(count + at, {KEEP: Cost(Held(frozenset({at})), Held(frozenset({at})))}) for at in reversed(range(count))
    )
    rest = (frozenset[int](),) * (2 * count + 1)
    profile = ModelProfile(tuple(map(str, range(2 * count))), (7,) * count, (*calls, *late), rest)
    found = solve(profile, 700)
    assert found.peak_bytes <= 700
    assert found.slack_bytes > 0
    best = brute(profile, 700 - found.slack_bytes)
    assert best is not None
    assert found.extra_seconds <= best.extra_seconds


def test_decide() -> None:
    assert decide("full", 2, 5) == (RECOMPUTE, RECOMPUTE)
    assert decide("selective", 1, 2) == (SELECTIVE,)
    assert decide("every_n", 4, 3) == (KEEP, KEEP, RECOMPUTE, KEEP)
    assert decide("every_n", 3, 1) == (RECOMPUTE,) * 3


def test_merge_takes_the_highest_of_each() -> None:
    first, second = chain([100, 50], [1.0, 4.0]), chain([80, 70], [2.0, 3.0], boundary=12)
    merged = merge([first, second])
    assert merged == chain([100, 70], [2.0, 4.0], boundary=12)
    assert merge([first]) == first


def test_merge_of_different_forwards_is_none() -> None:
    assert merge([chain([1], [1.0]), chain([1, 1], [1.0, 1.0])]) is None
