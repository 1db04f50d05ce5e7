"""Bytes of chunks: read or mapped, and checked whenever they are, then turned into tensors by who asks for those.

Note: mapped or read. A chunk that goes as it is into memory that is there is read straight into it. Otherwise a local
file is mapped, so that the elements that are wanted are copied once, out of the system's cache; of a store's a copy is
fetched, and not kept. Only :func:`as_tensor` loads
torch.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from ds_ckpt.checks import damaged
from ds_ckpt.checksums import BLOCK_BYTES, Checksum, checksum

if TYPE_CHECKING:
    from torch import Tensor

    from ds_ckpt.storage import File
    from ds_ckpt.stored import Stored, StoredChunk, StoredTensor
    from ds_core.interfaces.logical import LogicalTensor

__all__ = ["MAX_OPEN_FILES", "Ranges", "as_tensor", "label"]

MAX_OPEN_FILES = 32
"""A checkpoint has a file of each writer of each rank, and a process may usually open 1024; a mapped one takes two."""


def label(of: LogicalTensor) -> str:
    """Return what errors call a tensor.

    >>> from ds_core.interfaces.logical import LogicalTensor
    >>> label(LogicalTensor("layer.weight", "exp_avg", (3,), "float32"))
    "exp_avg 'layer.weight'"
    """
    return f"{of.kind} {of.name!r}" + ("" if of.rank is None else f" of rank {of.rank}")


class Ranges:
    """The bytes of a checkpoint's chunks; threads may share one. The files that were used last stay open."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._files: dict[str, File] = {}
        self._headers: set[str] = set()
        self._checked: set[tuple[str, int, int]] = set()
        self._lock = threading.Lock()

    def read_into(self, tensor: StoredTensor, chunk: StoredChunk, target: memoryview, *, start: int = 0) -> None:
        """Fill ``target`` with bytes of ``chunk`` from ``start``; where it has a checksum, ``target`` takes it whole.

        Raises:
            CheckpointError: naming file, tensor and kind: the bytes are not what was written. ``target`` has them.
        """
        file = self._open(chunk.file)
        found = Checksum()
        # A store is asked once, whatever it costs to sum later.
        step = BLOCK_BYTES if file.is_mapped and chunk.checksum is not None else max(1, len(target))
        for at in range(0, len(target), step):
            block = target[at : at + step]
            if not file.read_into(chunk.offset + start + at, block):
                raise self._damaged(tensor, chunk, "its file ends before it")
            if chunk.checksum is not None:
                found.update(block)
        if chunk.checksum is not None and str(found) != chunk.checksum:
            raise self._damaged(tensor, chunk, "its bytes are not what was written")

    def view(self, tensor: StoredTensor, chunk: StoredChunk) -> memoryview:
        """Return the bytes of ``chunk``, checked: mapped, and then the first time only, or a copy.

        Raises:
            CheckpointError: as :meth:`read_into`.
        """
        if not chunk.nbytes:
            return memoryview(b"")
        file = self._open(chunk.file)
        found = file.view(chunk.offset, chunk.nbytes)
        place = (chunk.file, chunk.offset, chunk.nbytes)
        if chunk.checksum is not None and not (file.is_mapped and place in self._checked):
            if checksum(found) != chunk.checksum:
                raise self._damaged(tensor, chunk, "its bytes are not what was written")
            self._checked.add(place)
        return found

    def close(self) -> None:
        """Let go of all files."""
        with self._lock:
            self._files.clear()

    def _open(self, name: str) -> File:
        with self._lock:
            file = self._files.pop(name, None)
            if file is None:
                while len(self._files) >= MAX_OPEN_FILES:
                    del self._files[next(iter(self._files))]
                file = _open_checked(self._stored, name, header=name not in self._headers)
                self._headers.add(name)
            self._files[name] = file  # as the last one
            return file

    def _damaged(self, tensor: StoredTensor, chunk: StoredChunk, why: str) -> Exception:
        place = f"{chunk.nbytes} bytes from {chunk.offset}"
        return damaged(f"{label(tensor.of)} is damaged: {why} ({place})", self._stored.folder, chunk.file)


def _open_checked(stored: Stored, name: str, *, header: bool) -> File:
    """Open a file of a checkpoint, whose size, and header if that is asked for, are what was written."""
    file, expected = stored.folder.open(name), stored.files[name]
    if file.nbytes != expected.nbytes:
        what = f"a file of the checkpoint has {file.nbytes} bytes instead of {expected.nbytes}"
        raise damaged(what, stored.folder, name)
    if header and expected.header is not None:
        head = bytearray(expected.header[0])
        if not file.read_into(0, memoryview(head)) or checksum(head) != expected.header[1]:
            what = f"the header of the file, its first {len(head)} bytes, is not what was written"
            raise damaged(what, stored.folder, name)
    return file


def as_tensor(view: memoryview, dtype: str, chunk: StoredChunk) -> Tensor:
    """Return the elements of a chunk as a tensor: flat, or of its box's shape where it has strides. No copy.

    Args:
        view: of :meth:`Ranges.view`.
        dtype: torch's word.
        chunk: whose bytes they are.
    """
    import torch

    wanted: torch.dtype = getattr(torch, dtype)
    if not view.nbytes:
        return torch.empty(chunk.chunk.box.size if chunk.strides is not None else 0, dtype=wanted)
    if chunk.offset % wanted.itemsize:
        # Some files of others start their tensors anywhere.
        view = memoryview(bytearray(view))
    flat = torch.frombuffer(view, dtype=wanted)
    return flat if chunk.strides is None else torch.as_strided(flat, chunk.chunk.box.size, chunk.strides)
