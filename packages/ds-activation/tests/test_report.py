"""The table of a choice."""

from __future__ import annotations

from ds_activation.choice import Call, Choice, Cost, Decision, Held, ModelProfile
from ds_activation.report import as_text, choice_table, summary

KEEP, RECOMPUTE = Decision.KEEP, Decision.RECOMPUTE
MIB = 2**20


def test_a_table() -> None:
    calls = []
    for at in range(2):
        kept = Held(frozenset({at}), 2 * MIB)
        calls.append(Call(at, {KEEP: Cost(kept, kept), RECOMPUTE: Cost(Held(frozenset({at})), kept, 0.004)}))
    rest = (frozenset({0}), frozenset[int](), frozenset[int]())
    profile = ModelProfile(("h.0", "h.1"), (MIB, MIB), tuple(calls), rest)
    choice = Choice((RECOMPUTE, KEEP), 5 * MIB, 6 * MIB, 0.004, slack_bytes=MIB // 2)
    lines = as_text(choice_table(profile, choice, 8 * MIB)).splitlines()
    rows = [line.split() for line in lines if line.strip().startswith("h.")]
    # The rest holds the first block's input anyway.
    assert rows == [["h.0", "recompute", "0.00", "4.00"], ["h.1", "keep", "3.00", "0.00"]]
    sums = next(line for line in lines if line.strip().startswith("whole model"))
    assert "1 keep, 1 recompute" in sums
    assert "6.00 of 8.00" in sums
    assert "a budget 0.50 MiB smaller" in " ".join(lines)


def test_a_summary() -> None:
    assert summary("every_n", None, (KEEP, RECOMPUTE, KEEP), None) == "policy every_n: 2 keep, 1 recompute"
    choice = Choice((KEEP,), MIB, MIB, 0.0015)
    line = summary("auto", choice, (KEEP,), 2 * MIB)
    assert line == "policy auto: 1 keep; at most 1.00 MiB of 2.00 MiB saved, 1.50 ms more per step"
