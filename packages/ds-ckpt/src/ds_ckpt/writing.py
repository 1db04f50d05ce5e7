"""Writes one file of a rank: safetensors, with the checksum of each chunk and of the whole, durable on return."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ds_ckpt.checksums import BLOCK_BYTES, Checksum, checksum
from ds_ckpt.stored import StoredChunk, StoredFile
from ds_core.checkpoint.files import bytes_of
from ds_core.checkpoint.safetensors_format import Entry, header
from ds_core.checkpoint.saving import chunk_key
from ds_core.interfaces.logical import Box, Chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from ds_ckpt.layout import Part
    from ds_ckpt.storage import Folder
    from ds_core.interfaces.logical import Piece

__all__ = ["bytes_of_chunk", "write_file"]


def write_file(
    folder: Folder, name: str, parts: Sequence[Part], on_written: Callable[[int], object] = lambda nbytes: None
) -> tuple[StoredFile, list[StoredChunk]]:
    """Write ``parts`` to a new file, one at a time through host memory; the content is synced, the folder is not.

    Args:
        folder: where.
        name: no file has it.
        parts: what.
        on_written: told of the bytes of each part once they are written.

    Returns:
        What the manifest says about the file, and about each part.

    Raises:
        OSError: with the file's name.
        CheckpointError: two parts of one name.
    """
    head = header([_entry(part) for part in parts], {"format": "pt"}, f"{folder}/{name}")
    whole = Checksum()
    whole.update(head)
    chunks: list[StoredChunk] = []
    with folder.create(name) as write:
        write(memoryview(head))
        at = len(head)
        for part in parts:
            nbytes, of_part = _write_part(part, write, whole)
            chunks.append(StoredChunk(part.chunk, name, at, nbytes, str(of_part)))
            at += nbytes
            on_written(nbytes)
    return StoredFile(name, at, str(whole), (len(head), checksum(head))), chunks


def _write_part(part: Part, write: Callable[[memoryview], object], whole: Checksum) -> tuple[int, Checksum]:
    """Write one part and return its size and checksum; a copy that it needed is let go of."""
    data, of_part = bytes_of_chunk(part.piece, part.chunk), Checksum()
    for low in range(0, len(data), BLOCK_BYTES):
        block = data[low : low + BLOCK_BYTES]
        write(block)
        whole.update(block)
        of_part.update(block)
    return len(data), of_part


def _entry(part: Part) -> Entry:
    # A box has its shape; an interval of one is flat.
    shape = part.chunk.box.size if part.chunk.is_whole_box else (part.chunk.length,)
    return Entry(chunk_key(part.piece.of, part.chunk), part.piece.of.dtype, shape)


def bytes_of_chunk(piece: Piece, chunk: Chunk) -> memoryview:
    """Return the elements of ``chunk``, an interval of the piece's, as bytes of the piece's logical dtype.

    A view of the piece where it lies in host memory like that, else a copy of these elements alone.
    """
    dtype: torch.dtype = getattr(torch, piece.of.dtype)
    if not chunk.length:
        return memoryview(b"")
    return bytes_of(_elements(piece.data.detach(), piece.chunk, chunk).to("cpu", dtype))


def _elements(data: Tensor, held: Chunk, wanted: Chunk) -> Tensor:
    """Return the elements ``wanted`` of ``data``, which holds ``held`` of the same box, in one dimension."""
    start = wanted.offset - held.offset
    if data.is_contiguous() or data.dim() == 1:
        return data.reshape(-1)[start : start + wanted.length]
    # A box with strides of its own. Made contiguous as a whole it would be a second copy of all of it.
    inner = Chunk(Box((0,) * data.dim(), tuple(data.shape)), start, wanted.length)
    found = torch.empty(wanted.length, dtype=data.dtype, device=data.device)
    for span in inner.spans():
        index = tuple(slice(s, s + n) for s, n in zip(span.box.start, span.box.size, strict=True))
        found[span.offset : span.offset + span.box.numel].view(span.box.size).copy_(data[index])
    return found
