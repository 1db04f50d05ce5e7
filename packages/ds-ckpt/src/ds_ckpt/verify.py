"""Reads every byte of a checkpoint and compares checksums. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_ckpt.checksums import Checksum
from ds_ckpt.ranges import label
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ds_ckpt.storage import File
    from ds_ckpt.stored import Stored, StoredFile

__all__ = ["Damage", "find_damage"]

_READ_BYTES = 2**25
"""Of a damaged file at a time: a request to a store costs as much time as some megabytes."""


@dataclass(frozen=True)
class Damage:
    """A file that is not what was written."""

    file: str
    what: str
    """Which tensors it is, or which other part."""


def find_damage(stored: Stored, progress: Callable[[int], None]) -> Iterator[Damage]:
    """Yield the files that are not what was written; those without a checksum are read to their end.

    Args:
        stored: the checkpoint; its manifest was checked when it was read.
        progress: told how many bytes were read since the last time.
    """
    for file in stored.files.values():
        try:
            found = _checksum_of(stored, file, progress)
            # Its parts are read once more: the file may be gone, or another one, by then.
            where = None if file.checksum in (None, found) else _place(stored, file)
        except CheckpointError as error:
            where = error.what
        if where is not None:
            yield Damage(file.name, where)


def _checksum_of(stored: Stored, file: StoredFile, progress: Callable[[int], None]) -> str:
    whole = Checksum()
    for block in stored.folder.open(file.name).blocks():
        whole.update(block)
        progress(len(block))
    return str(whole)


def _place(stored: Stored, file: StoredFile) -> str:
    """Return which part of a damaged file it is."""
    found: dict[str, None] = {}
    opened = stored.folder.open(file.name)
    if file.header is not None and _checksum_at(opened, 0, file.header[0]) != file.header[1]:
        found["the header"] = None
    for tensor in stored.tensors.values():
        for chunk in tensor.chunks:
            if chunk.file != file.name or not chunk.nbytes or chunk.checksum is None:
                continue
            if _checksum_at(opened, chunk.offset, chunk.nbytes) != chunk.checksum:
                found[label(tensor.of)] = None
    return ", ".join(found) or "a part that holds no tensor"


def _checksum_at(file: File, offset: int, nbytes: int) -> str | None:
    """Return the checksum of ``nbytes`` from ``offset``; None where the file ends before."""
    found, block = Checksum(), memoryview(bytearray(min(nbytes, _READ_BYTES)))
    for at in range(0, nbytes, _READ_BYTES):
        part = block[: min(_READ_BYTES, nbytes - at)]
        if not file.read_into(offset + at, part):
            return None
        found.update(part)
    return str(found)
