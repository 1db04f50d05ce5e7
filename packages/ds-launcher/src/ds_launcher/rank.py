"""One rank of a job: its command and environment, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_launcher.processes import MARK

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterable

    from ds_launcher.output import Log, Tail
    from ds_launcher.spec import AgentSpec

__all__ = ["Rank", "first_failed", "rank_command", "rank_environment"]


@dataclass
class Rank:
    """One process of the job, as its agent sees it."""

    rank: int
    local_rank: int
    popen: subprocess.Popen[bytes]
    tail: Tail
    log: Log | None
    status: int | None = None
    """Exit code or minus the signal; None while it runs."""
    ended_tick: int = 0
    was_asked: bool = False
    """Whether we had sent it a signal when it ended."""
    pidfd: int | None = None

    @property
    def failed_tick(self) -> int:
        """When it failed. Python prints its traceback before it closes its sockets, so before others fail of that."""
        if self.status == 1 and self.tail.traceback_tick is not None:
            return min(self.tail.traceback_tick, self.ended_tick)
        return self.ended_tick


def first_failed(ranks: Iterable[Rank]) -> Rank | None:
    """Return the rank that failed first, or None. Ranks that ended because they were asked to have not failed."""
    failed = [rank for rank in ranks if rank.status and not rank.was_asked]
    return min(failed, key=lambda rank: rank.failed_tick) if failed else None


def rank_command(spec: AgentSpec, local_rank: int) -> list[str]:
    """Return the program and arguments of one rank.

    >>> from ds_launcher.spec import AgentSpec
    >>> from ds_launcher.spec import AgentSpec
    >>> spec = AgentSpec(["python", "a.py", "-x"], "id", nproc=2, world_size=2, local_rank_at=2)
    >>> rank_command(spec, 1)
    ['python', 'a.py', '--local_rank=1', '-x']
    """
    command = list(spec.command)
    if spec.local_rank_at is not None:
        command.insert(spec.local_rank_at, f"--local_rank={local_rank}")
    return command


def rank_environment(spec: AgentSpec, local_rank: int) -> dict[str, str]:
    """Return the variables set for one rank."""
    return {
        **spec.env,
        MARK: spec.job_id,
        "RANK": str(spec.first_rank + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(spec.world_size),
        "LOCAL_WORLD_SIZE": str(spec.nproc),
        "LOCAL_SIZE": str(spec.nproc),
        "CROSS_RANK": str(spec.node_rank),
        "CROSS_SIZE": str(spec.nodes),
        "MASTER_ADDR": spec.master_addr,
        "MASTER_PORT": str(spec.master_port),
    }
