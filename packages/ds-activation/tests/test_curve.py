"""The policies of a profile: their order, and what ``auto`` is asked for."""

from __future__ import annotations

import pytest

from ds_activation.choice import Call, Cost, Decision, Held, ModelProfile, least_peak
from ds_activation.curve import BUDGETS, policies
from ds_core.errors import ConfigError


def profile(blocks: int = 4) -> ModelProfile:
    """Return blocks that save 100 bytes each beside 10 of their input."""

    def call(at: int) -> Call:
        kept = Held(frozenset({at}), 100)
        return Call(
            at,
            {
                Decision.KEEP: Cost(kept, kept),
                Decision.RECOMPUTE: Cost(Held(frozenset({at})), kept, 1.0),
            },
        )

    return ModelProfile(
        tuple(f"b{at}" for at in range(blocks)),
        (10,) * blocks,
        tuple(call(at) for at in range(blocks)),
        (frozenset(),) * (blocks + 1),
    )


def test_policies_without_a_budget():
    found = {policy: choice for policy, choice in policies(profile()) if not policy.startswith("auto")}
    assert {name: (choice.saved_bytes, choice.extra_seconds) for name, choice in found.items()} == {
        "none": (440, 0.0),
        "every_n, 4": (340, 1.0),
        "every_n, 3": (340, 1.0),
        "every_n, 2": (240, 2.0),
        "full": (40, 4.0),
    }


def test_auto_goes_from_everything_to_the_least():
    found = [choice for policy, choice in policies(profile()) if policy.startswith("auto")]
    assert len(found) == BUDGETS
    assert (found[0].peak_bytes, found[0].extra_seconds) == (440, 0.0)
    assert found[-1].peak_bytes == least_peak(profile()) == 140
    assert [choice.extra_seconds for choice in found] == sorted(choice.extra_seconds for choice in found)


def test_one_budget():
    [point] = [point for point in policies(profile(), 250) if point.policy.startswith("auto")]
    assert point.choice.peak_bytes <= 250
    with pytest.raises(ConfigError, match="140"):
        policies(profile(), 100)
