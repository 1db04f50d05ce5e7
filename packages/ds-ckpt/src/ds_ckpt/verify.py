"""Reads every byte of a checkpoint and compares checksums. Loads no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from ds_ckpt.checks import open_inside
from ds_ckpt.manifest import checksum
from ds_ckpt.ranges import label
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ds_ckpt.stored import Stored, StoredFile

__all__ = ["Damage", "find_damage"]

_BLOCK_BYTES = 2**22


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
        except CheckpointError as error:
            yield Damage(file.name, error.what)
            continue
        except OSError as error:
            yield Damage(file.name, f"cannot be read: {error.strerror}")
            continue
        if file.checksum is not None and found != file.checksum:
            yield Damage(file.name, _place(stored, file))


def _checksum_of(stored: Stored, file: StoredFile, progress: Callable[[int], None]) -> str:
    whole, buffer = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK_BYTES))
    descriptor = open_inside(stored.folder, file.name)
    try:
        while count := os.readv(descriptor, [buffer]):
            whole.update(buffer[:count])
            progress(count)
    finally:
        os.close(descriptor)
    return f"xxh3:{whole.hexdigest()}"


def _place(stored: Stored, file: StoredFile) -> str:
    """Return which part of a damaged file it is."""
    chunks = [(t, c) for t in stored.tensors.values() for c in t.chunks if c.file == file.name and c.nbytes]
    found: dict[str, None] = {}
    descriptor = open_inside(stored.folder, file.name)
    try:
        if file.header is not None and checksum(_read(descriptor, 0, file.header[0])) != file.header[1]:
            found["the header"] = None
        for tensor, chunk in chunks:
            if chunk.checksum is not None and checksum(_read(descriptor, chunk.offset, chunk.nbytes)) != chunk.checksum:
                found[label(tensor.of)] = None
    finally:
        os.close(descriptor)
    return ", ".join(found) or "a part that holds no tensor"


def _read(descriptor: int, offset: int, nbytes: int) -> memoryview:
    target = memoryview(bytearray(nbytes))
    filled = 0
    while filled < nbytes and (count := os.preadv(descriptor, [target[filled:]], offset + filled)):
        filled += count
    return target[:filled]
