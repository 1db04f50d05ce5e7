"""What blocks save, what policies lead to, and the choice of ``auto``, as tables."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

from ds_activation.choice import Choice, Decision, predict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from ds_activation.choice import ModelProfile
    from ds_activation.curve import Point

__all__ = ["BlockCosts", "as_text", "block_table", "choice_table", "costs_of_blocks", "policy_table", "summary"]

_MIB = 2**20


def choice_table(profile: ModelProfile, choice: Choice, budget_bytes: int) -> Table:
    """Return a row per block, and the sums against the budget.

    A block's saved bytes are what its decision adds; a storage that several blocks hold is in the first one's.
    """
    from rich import box
    from rich.table import Table

    table = Table(title="activation checkpointing: auto", box=box.SIMPLE_HEAD, show_footer=True)
    table.caption = _caveats(choice)
    table.add_column("block", footer="whole model")
    table.add_column("decision", footer=_counts(choice))
    table.add_column(
        "saved MiB", justify="right", footer=f"{choice.peak_bytes / _MIB:.2f} of {budget_bytes / _MIB:.2f}"
    )
    table.add_column("extra ms", justify="right", footer=f"{1000 * choice.extra_seconds:.2f}")
    saved, seconds = _by_block(profile, choice)
    for at, name in enumerate(profile.blocks):
        decision = choice.decisions[at].value
        table.add_row(name, decision, f"{saved[at] / _MIB:.2f}", f"{1000 * seconds[at]:.2f}")
    return table


class BlockCosts(NamedTuple):
    """What each block costs, in the order of the profile's."""

    saved_bytes: list[int]
    """Where every block is kept; a storage that several hold is in the first one's."""
    again_seconds: list[float]
    """To compute it again."""
    outside_bytes: int
    """What the rest of the model saves."""


def costs_of_blocks(profile: ModelProfile) -> BlockCosts:
    """Return what each block saves, and what it takes to compute it again."""
    all_kept = predict(profile, (Decision.KEEP,) * len(profile.blocks))
    saved, _ = _by_block(profile, all_kept)
    _, again = _by_block(profile, predict(profile, (Decision.RECOMPUTE,) * len(profile.blocks)))
    return BlockCosts(saved, again, all_kept.saved_bytes - sum(saved))


def block_table(profile: ModelProfile) -> Table:
    """Return a row per block: what it saves when it is kept, and what it takes to compute it again."""
    from rich import box
    from rich.table import Table

    table = Table(title="what a forward keeps for backward", box=box.SIMPLE_HEAD, show_footer=True)
    saved, again, outside = costs_of_blocks(profile)
    table.add_column("block", footer=f"{len(profile.blocks)} blocks; {outside / _MIB:.2f} MiB outside of them")
    table.add_column("saved MiB", justify="right", footer=f"{sum(saved) / _MIB:.2f}")
    table.add_column("again, ms", justify="right", footer=f"{1000 * sum(again):.2f}")
    for name, nbytes, seconds in zip(profile.blocks, saved, again, strict=True):
        table.add_row(name, f"{nbytes / _MIB:.2f}", f"{1000 * seconds:.2f}")
    return table


def policy_table(points: Sequence[Point]) -> Table:
    """Return a row per policy: the peak of what is saved, and the time it adds to a step."""
    from rich import box
    from rich.table import Table

    table = Table(title="policies", box=box.SIMPLE_HEAD)
    table.add_column("policy")
    table.add_column("peak MiB", justify="right")
    table.add_column("extra ms", justify="right")
    table.add_column("blocks")
    for policy, choice in points:
        peak, extra = f"{choice.peak_bytes / _MIB:.2f}", f"{1000 * choice.extra_seconds:.2f}"
        table.add_row(policy, peak, extra, _counts(choice))
    return table


def _caveats(choice: Choice) -> str | None:
    said = []
    if choice.slack_bytes:
        short = f"{choice.slack_bytes / _MIB:.2f} MiB"
        said.append(f"as fast as any choice for a budget {short} smaller, for too many were to be compared for more")
    if not choice.is_per_block:
        said.append("blocks that are called several times were taken together")
    return "; ".join(said) or None


def as_text(table: Table, width: int = 100) -> str:
    """Return ``table`` without colours."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=width, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def summary(policy: str, choice: Choice | None, decisions: tuple[Decision, ...], budget_bytes: int | None) -> str:
    """Return one line of what a policy does."""
    line = f"policy {policy}: {_counts(decisions)}"
    if choice is None:
        return line
    return (
        f"{line}; at most {choice.peak_bytes / _MIB:.2f} MiB of {(budget_bytes or 0) / _MIB:.2f} MiB saved, "
        f"{1000 * choice.extra_seconds:.2f} ms more per step"
    )


def _counts(decisions: Choice | tuple[Decision, ...]) -> str:
    of = decisions.decisions if isinstance(decisions, Choice) else decisions
    return ", ".join(f"{of.count(decision)} {decision.value}" for decision in Decision if decision in of)


def _by_block(profile: ModelProfile, choice: Choice) -> tuple[list[int], list[float]]:
    counted: set[int] = set()
    saved, seconds = [0] * len(profile.blocks), [0.0] * len(profile.blocks)
    for rest, call in zip(profile.rest[:-1], profile.calls, strict=True):
        counted |= rest
        cost = call.costs[choice.decisions[call.block]]
        saved[call.block] += cost.held.own_bytes + profile.bytes_of(cost.held.shared - counted)
        seconds[call.block] += cost.seconds
        counted |= cost.held.shared
    return saved, seconds
