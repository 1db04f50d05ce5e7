"""Seam ``runner``: starts the ranks of a job on hosts.

The entry name is the launcher's word (``local``, ``slurm``, ...). Torch-free. Contract: ``ds_core.testing.runner``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Job", "Runner"]


@dataclass(frozen=True)
class Job:
    """What to run: the same command once per rank."""

    command: Sequence[str]
    """Program and arguments of one rank."""
    nproc: int
    """Ranks on each host."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Set for every rank, over what the runner passes on."""
    master_addr: str = "127.0.0.1"
    master_port: int | None = None
    """None: the runner finds a free port."""


class Runner(ABC):
    """Starts a job and answers for its processes until the last one is gone."""

    @abstractmethod
    def problem(self) -> str | None:
        """Return why this runner cannot be used here, or None."""

    @abstractmethod
    def commands(self, job: Job) -> Mapping[str, Sequence[str]]:
        """Return host -> the command that starts its ranks, for people (``--dry-run``). Starts nothing."""

    @abstractmethod
    def run(self, job: Job) -> int:
        """Start every rank with RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; wait.

        When one rank fails the others are ended, and the failed rank's last error lines are printed last.

        Returns:
            0, the exit code of the rank that failed first, or 128 + the signal that killed it. No process of the job,
            grandchildren included, is alive then.

        Raises:
            LaunchError: the job cannot be started at all.
        """
