"""The last lines of a job that failed: which rank, where, how, and what it said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_launcher.processes import signal_name

if TYPE_CHECKING:
    from ds_launcher.spec import RankFailure

__all__ = ["describe", "describe_status"]


def describe_status(status: int) -> str:
    """Return how a process ended, from its exit code or minus its signal.

    >>> describe_status(-9), describe_status(3)
    ('killed by SIGKILL', 'exit code 3')
    """
    return f"exit code {status}" if status >= 0 else f"killed by {signal_name(-status)}"


def describe(failure: RankFailure) -> str:
    """Return the block printed last: rank, host and status first, then the traceback or the last lines of stderr."""
    lines = [f"ds run: rank {failure.rank} on host {failure.host} failed first: {describe_status(failure.status)}"]
    if failure.out_of_memory:
        lines.append(f"  memory: {failure.out_of_memory}")
    if failure.log:
        lines.append(f"  log: {failure.log}")
    if not failure.stderr_lines:
        lines.append("  it wrote nothing to stderr")
    elif failure.is_traceback:
        lines.append(f"  traceback of rank {failure.rank}:")
    else:
        lines.append(f"  last lines of its stderr ({len(failure.stderr_lines)}):")
    return "\n".join([*lines, *(f"    {line}" if line else "" for line in failure.stderr_lines)])
