"""What engines share that store pieces as tensors by name: a row about each, and reading them back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ds_core.checkpoint.coverage import not_once
from ds_core.checkpoint.safetensors_format import ITEM_BYTES
from ds_core.checkpoint.saving import chunk_key
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Box, Chunk, LogicalTensor, Piece, overlaps

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

__all__ = ["Filling", "check_once", "describe", "from_row"]


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
    """Return what :func:`describe` was given.

    Raises:
        KeyError, TypeError, ValueError: no :func:`describe` returned such a row.
    """
    of = LogicalTensor(row["name"], row["kind"], _whole(row["shape"]), row["dtype"], row["rank"])
    if not all(isinstance(text, str) for text in (of.name, of.kind, of.dtype)) or of.dtype not in ITEM_BYTES:
        raise ValueError(f"no tensor is {str(of)[:200]}")
    if of.rank is not None:
        _whole([of.rank])
    start, size = map(_whole, row["box"])
    offset, length = _whole(row["interval"])
    box = Box(start, size)
    if any(a + n > full for a, n, full in zip(start, size, of.shape, strict=True)) or offset + length > box.numel:
        raise ValueError(f"a chunk of {of.kind} {of.name!r} is not inside it")
    return of, Chunk(box, offset, length)


def _whole(values: Sequence[Any]) -> tuple[int, ...]:
    found = tuple(values)
    if any(type(value) is not int or value < 0 for value in found):
        raise ValueError(f"expected whole numbers, found {str(found)[:80]}")
    return found


def check_once(rows: Iterable[tuple[LogicalTensor, Chunk]]) -> None:
    """Check that the chunks of a checkpoint hold each of its tensors once; what :class:`Filling` relies on.

    Raises:
        ValueError: naming the tensor of which elements are missing or there twice, or that has two shapes or dtypes.
    """
    found: dict[tuple[str, str, int | None], tuple[LogicalTensor, list[Chunk]]] = {}
    for of, chunk in rows:
        known, chunks = found.setdefault((of.name, of.kind, of.rank), (of, []))
        if known != of:
            raise ValueError(f"{of.kind} {of.name!r} is {list(known.shape)} of {known.dtype}, and {list(of.shape)} too")
        chunks.append(chunk)
    for of, chunks in found.values():
        problem = not_once(of.shape, chunks)
        if problem:
            raise ValueError(f"{of.kind} {of.name!r}: {problem}")


class Filling:
    """A piece that is filled in place, chunk by chunk, whatever its dtype and strides.

    Elements are counted, so the chunks must have been checked with :func:`check_once`.

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
