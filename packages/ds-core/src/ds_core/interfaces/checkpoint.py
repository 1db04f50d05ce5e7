"""Seam ``checkpoint``: stores and loads a set of logical tensors. The entry name is ``checkpoint.engine``.

Contract: ``ds_core.testing.checkpoint``.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch.distributed import ProcessGroup

    from ds_core.config import Section
    from ds_core.interfaces.logical import LogicalTensor, Piece, Snapshot

    Directory = Path | str
    """Where checkpoints live: a path, or a URL as text for an engine whose ``takes_urls`` is true."""

__all__ = ["CheckpointEngine", "CheckpointReader", "Directory", "digest"]


def digest(*parts: Any) -> str:
    """Return a digest of what JSON can hold; equal for equal parts, in whatever process."""
    text = json.dumps(parts, default=lambda value: dict(value) if hasattr(value, "keys") else type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


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

    @property
    def identity(self) -> str:
        """A digest that differs from that of another save under the same tag; the ranks that load compare it.

        Here that of the state and the table of tensors. An engine that knows more of a save, such as an id in the
        names of its files, says more.
        """
        return digest(self.world_size, self.state, list(map(repr, self.tensors())))

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
    """Writes and opens checkpoints ``directory/tag``. One per engine."""

    Config: ClassVar[type[Section] | None] = None
    """Options of its own, ``checkpoint.<name>``."""
    takes_urls: ClassVar[bool] = False
    """Whether ``directory`` may be a URL, such as ``s3://bucket/run``; if not, the core refuses one before any call."""
    reads_universal: ClassVar[bool] = False
    """Whether :meth:`open` reads DeepSpeed's universal folders; if not, ``checkpoint.load_universal`` is refused."""

    completes_at_commit: ClassVar[bool] = False
    """Whether a save becomes a checkpoint only by the ranks' :meth:`commit`. Then ``engine.destroy()`` calls it before
    :meth:`close`, on every rank, unless an error is on its way up."""

    def __init__(self, options: Section | None, group: ProcessGroup | None) -> None:
        """``group``: the ranks that save together; None for one process without a process group."""
        self.options, self.group = options, group

    @abstractmethod
    def save(self, directory: Directory, tag: str, snapshot: Snapshot, *, latest: bool) -> None:
        """Store ``snapshot``. Every rank of the group calls it.

        On return the tensors of the snapshot may change. The checkpoint is complete, durable and visible on return,
        or, of an engine that writes in the background, once :meth:`commit` returns. A crash at any point leaves what
        was loadable before loadable. With ``latest`` the file ``directory/latest`` names the tag, written last.

        Args:
            directory: a path that exists, or a URL.
            tag: one plain name.
            snapshot: this rank's view of it.
            latest: whether ``directory/latest`` names it from then on.

        Raises:
            CheckpointError: on every rank, with the reason of the one that failed; also where an earlier save, in the
                background, did. Then this one was not begun.
        """

    @abstractmethod
    def open(self, directory: Directory, tag: str) -> CheckpointReader:
        """Open a complete checkpoint; no collective.

        Raises:
            CheckpointError: there is none, or it is half there; the fix names tags that are complete.
        """

    @abstractmethod
    def read_latest(self, directory: Directory) -> str:
        """Return the tag that ``directory/latest`` names; no collective.

        Raises:
            NoCheckpointError: there is no such folder, or no checkpoint of any kind in it: ``load_checkpoint`` warns,
                and returns (None, None).
            CheckpointError: checkpoints are in it, but no such file.
        """

    def read_latest_universal(self, directory: Directory) -> str:
        """Return the tag to load where ``checkpoint.load_universal`` is true and none is given; no collective.

        It is the one that ``directory/latest_universal`` names; without that file the one in ``latest``, where that
        is a checkpoint of this seam: those load at any world size, too. Called only where ``reads_universal`` is true.

        Raises:
            CheckpointError: there is no such folder, or neither file in it.
        """
        return self.read_latest(directory)

    def commit(self) -> None:
        """Wait until every save is durable and visible. Every rank of the group calls it.

        Called before a checkpoint is loaded and by whoever must know that one is safe. Nothing to wait for unless the
        engine writes in the background.

        Raises:
            CheckpointError: on every rank: a save in the background failed. It is told once.
        """
        return

    def close(self) -> None:
        """End what runs in the background, having waited for what is this rank's own; from ``engine.destroy()``.

        What was saved can still be opened. With several ranks it must not ask for another one: a rank that ends because
        of an error closes, too, and its peers may be elsewhere. A save that only :meth:`commit` would complete is
        discarded then, and told.

        Raises:
            CheckpointError: a save in the background failed, or was discarded. Everything is let go all the same.
        """
        self.commit()
