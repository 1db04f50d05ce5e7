"""What a checkpoint holds and where its bytes are, whatever format it is in. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ds_ckpt.storage import Folder
    from ds_core.interfaces.logical import Chunk, LogicalTensor

__all__ = ["Key", "Stored", "StoredChunk", "StoredFile", "StoredTensor"]

Key = tuple[str, str, int | None]
"""(name, kind, rank) of a logical tensor; rank is None but for a partial gradient."""


@dataclass(frozen=True)
class StoredFile:
    """One file of a checkpoint."""

    name: str
    """Path relative to the checkpoint's folder, with ``/``; never absolute, never through ``..`` or a link."""
    nbytes: int
    """Its size."""
    checksum: str | None
    """``xxh3:`` and 32 hex digits of its XXH3-128, or None where the format has none."""
    header: tuple[int, str] | None = None
    """Bytes and checksum of what is before its first chunk, where the format has one for it."""


@dataclass(frozen=True)
class StoredChunk:
    """Where the elements of one chunk of a tensor are: ``nbytes`` from ``offset`` of ``file``, little-endian."""

    chunk: Chunk
    file: str
    offset: int
    nbytes: int
    checksum: str | None = None
    strides: tuple[int, ...] | None = None
    """In elements, where the chunk is a whole box whose elements are not row by row; None: they are."""


@dataclass(frozen=True)
class StoredTensor:
    """A logical tensor with all its chunks."""

    of: LogicalTensor
    chunks: tuple[StoredChunk, ...]

    @property
    def key(self) -> Key:
        return self.of.name, self.of.kind, self.of.rank


@dataclass(frozen=True)
class Stored:
    """A complete checkpoint."""

    folder: Folder
    """The folder of the tag."""
    format: str
    """``ds-sharded``, ``ds-plain`` or ``deepspeed``."""
    version: str
    world_size: int
    """Ranks that wrote it."""
    tensors: Mapping[Key, StoredTensor]
    files: Mapping[str, StoredFile]
    state: Mapping[str, Any]
    """JSON in the form of ``ds_core.interfaces.logical.Snapshot.state``, equal on all ranks."""
    rank_states: tuple[Mapping[str, Any], ...] = field(default=())
    """JSON of each rank; empty where the format keeps none."""

    def __repr__(self) -> str:
        return f"<Stored {self.format} {self.version} {str(self.folder)!r}, {len(self.tensors)} tensors>"
