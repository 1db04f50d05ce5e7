"""What engines share that store pieces as tensors by name: which ones, a row about each, and reading them back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ds_core.checkpoint.saving import chunk_key
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Box, Chunk, LogicalTensor, Piece, overlaps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

__all__ = ["Filling", "describe", "from_row", "written_by"]


def written_by(rank: int, pieces: Sequence[Piece]) -> dict[str, Piece]:
    """Return what ``rank`` writes, by name, each chunk once."""
    # A chunk without elements says nothing, unless the tensor has none at all; such a one is stored once.
    return {
        chunk_key(piece.of, piece.chunk): piece
        for piece in pieces
        if piece.writer == rank and (piece.chunk.length or not piece.of.numel)
    }


def describe(piece: Piece) -> dict[str, Any]:
    """Return the row about ``piece``, in what JSON can hold."""
    of, chunk = piece.of, piece.chunk
    return {
        "key": chunk_key(of, chunk),
        "name": of.name,
        "kind": of.kind,
        "shape": of.shape,
        "dtype": of.dtype,
        "rank": of.rank,
        "box": [chunk.box.start, chunk.box.size],
        "interval": [chunk.offset, chunk.length],
    }


def from_row(row: Mapping[str, Any]) -> tuple[LogicalTensor, Chunk]:
    """Return what :func:`describe` was given."""
    of = LogicalTensor(row["name"], row["kind"], tuple(row["shape"]), row["dtype"], row["rank"])
    start, size = row["box"]
    return of, Chunk(Box(tuple(start), tuple(size)), *row["interval"])


class Filling:
    """A piece that is filled in place, chunk by chunk, whatever its dtype and strides.

    Args:
        piece: what to fill.
        of: the tensor as it is stored; None: it is not.
        where: the checkpoint, for errors.

    Raises:
        CheckpointError: the tensor is missing, or has another shape.
    """

    def __init__(self, piece: Piece, of: LogicalTensor | None, where: str) -> None:
        self._label = f"{piece.of.kind} {piece.of.name!r}"
        if of is None:
            raise CheckpointError(
                f"the checkpoint has no {self._label}",
                where=where,
                fix="load it into the model that wrote it, or pass load_module_strict=False to leave it as it is",
            )
        if of.shape != piece.of.shape:
            raise CheckpointError(
                f"{self._label} has shape {list(of.shape)} in the checkpoint and {list(piece.of.shape)} in the model",
                where=where,
                fix="load it into a model of the same sizes",
            )
        self._piece, self._where, self._filled = piece, where, 0
        self._target = piece.data if piece.data.is_contiguous() else torch.empty_like(piece.data).contiguous()

    @torch.no_grad()
    def take(self, chunk: Chunk, data: Tensor) -> None:
        """Copy what ``chunk``, stored as ``data`` row by row, has of the piece."""
        flat, source = self._target.view(-1), data.reshape(-1)
        for part in overlaps(chunk, self._piece.chunk):
            a, b = part.source, part.target
            from_box = source[a.offset : a.offset + a.box.numel].view(a.box.size)[part.source_slices]
            to_box = flat[b.offset : b.offset + b.box.numel].view(b.box.size)[part.target_slices]
            to_box.copy_(from_box)
            self._filled += part.numel

    @torch.no_grad()
    def end(self) -> None:
        """Say that no more chunks come.

        Raises:
            CheckpointError: not all elements were there.
        """
        if self._filled != self._piece.chunk.length:
            raise CheckpointError(
                f"{self._label}: the checkpoint has {self._filled} of {self._piece.chunk.length} elements",
                where=self._where,
            )
        if self._target is not self._piece.data:
            self._piece.data.copy_(self._target.view_as(self._piece.data))
