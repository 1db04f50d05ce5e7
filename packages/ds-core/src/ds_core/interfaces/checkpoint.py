"""Seam ``checkpoint``: stores and loads a set of logical tensors. The entry name is ``checkpoint.engine``.

Contract: ``ds_core.testing.checkpoint``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch.distributed import ProcessGroup

    from ds_core.config import Section
    from ds_core.interfaces.logical import LogicalTensor, Piece, Snapshot

__all__ = ["CheckpointEngine", "CheckpointReader"]


class CheckpointReader(ABC):
    """One stored checkpoint, opened for reading. Needs no process group."""

    @property
    @abstractmethod
    def state(self) -> Mapping[str, Any]:
        """The snapshot's ``state``."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """How many ranks wrote it."""

    @abstractmethod
    def rank_state(self, rank: int) -> Mapping[str, Any]:
        """Return the ``rank_state`` of the rank that wrote it as ``rank < world_size``; empty if there is none."""

    @abstractmethod
    def tensors(self) -> Sequence[LogicalTensor]:
        """Return every logical tensor stored, each once."""

    @abstractmethod
    def read(self, wanted: Sequence[Piece]) -> None:
        """Fill ``wanted`` in place, whatever chunks the checkpoint was written in. Converts dtypes on the way.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or its file is damaged. What was read until
                then stays read.
        """

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class CheckpointEngine(ABC):
    """Writes and opens checkpoints ``directory/tag``. One per engine; holds no state between calls."""

    Config: ClassVar[type[Section] | None] = None
    """Options of its own, ``checkpoint.<name>``."""

    def __init__(self, options: Section | None, group: ProcessGroup | None) -> None:
        """``group``: the ranks that save together; None for one process without a process group."""
        self.options, self.group = options, group

    @abstractmethod
    def save(self, directory: Path, tag: str, snapshot: Snapshot, *, latest: bool) -> None:
        """Store ``snapshot``; on return it is complete, durable and visible. Every rank of the group calls it.

        A crash at any point leaves what was loadable before loadable. ``directory`` exists. With ``latest`` the file
        ``directory/latest`` names the tag, written last.

        Raises:
            CheckpointError: on every rank, with the reason of the one that failed.
        """

    @abstractmethod
    def open(self, directory: Path, tag: str) -> CheckpointReader:
        """Open a complete checkpoint; no collective.

        Raises:
            CheckpointError: there is none, or it is half there; the fix names tags that are complete.
        """
