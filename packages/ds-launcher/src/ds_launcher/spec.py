"""What a launcher tells the agent of a host, and what the agent answers: plain data that travels as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

__all__ = ["GRACE_S", "AgentReport", "AgentSpec", "RankFailure", "encode"]

GRACE_S = 8.0
"""Default seconds between asking processes to end and killing them; below 10, within which a job must be gone."""


@dataclass(frozen=True)
class AgentSpec:
    """The share of a job that one host runs. Sent to the agent's standard input, never on a command line."""

    command: list[str]
    """Program and arguments, the same for every rank."""
    job_id: str
    """Marks every process of the job through the variable :data:`ds_launcher.processes.MARK`."""
    nproc: int
    """Ranks on this host."""
    world_size: int
    first_rank: int = 0
    """Global rank of this host's local rank 0."""
    node_rank: int = 0
    nodes: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    env: dict[str, str] = field(default_factory=dict)
    """Set for every rank, over the agent's own environment and below the variables that name the rank."""
    grace_s: float = GRACE_S
    """Seconds between asking processes to end and killing them."""
    local_rank_at: int | None = None
    """Where in ``command`` to insert ``--local_rank=K``; None: nowhere."""
    log_dir: str | None = None
    """Folder for a copy of every rank's output; exists already."""
    stdin_fd: int | None = None
    """Descriptor that becomes standard input of rank 0; None: ``/dev/null``."""
    report_fd: int = 1
    """Descriptor the :class:`AgentReport` is written to."""


@dataclass(frozen=True)
class RankFailure:
    """The rank that failed first."""

    rank: int
    host: str
    pid: int
    status: int
    """Exit code, or minus the number of the signal that ended it."""
    stderr_lines: list[str]
    """Its traceback, or its last lines."""
    is_traceback: bool
    out_of_memory: str | None = None
    """For SIGKILL: what the kernel says about out-of-memory kills."""
    log: str | None = None

    @property
    def exit_code(self) -> int:
        """The code a shell would show: the exit code, or 128 + signal."""
        return self.status if self.status >= 0 else 128 - self.status


@dataclass(frozen=True)
class AgentReport:
    """How the ranks of one host ended. All processes of the job on that host are gone when it is sent."""

    failure: RankFailure | None = None
    """The first failure that the agent did not cause itself."""
    signal: int | None = None
    """The signal that asked the job to end, if one came before any failure."""
    error: str | None = None
    """Why the ranks could not be started at all."""
    survivors: list[int] = field(default_factory=list)
    """Processes that even SIGKILL did not end (stuck in the kernel)."""

    @classmethod
    def decode(cls, text: bytes) -> AgentReport:
        """Read what :func:`encode` wrote."""
        values = json.loads(text)
        if values["failure"] is not None:
            values["failure"] = RankFailure(**values["failure"])
        return cls(**values)


def encode(message: AgentSpec | AgentReport) -> bytes:
    """Return ``message`` as one line of JSON.

    >>> AgentReport.decode(encode(AgentReport(signal=15))).signal
    15
    """
    # ASCII output keeps lone surrogates, which is how Python carries arguments and variables that are not UTF-8.
    return json.dumps(asdict(message), ensure_ascii=True).encode() + b"\n"
