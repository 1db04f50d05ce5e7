"""Reads any :class:`ds_ckpt.stored.Stored` into tensors, whatever chunks they are wanted in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ds_ckpt.ranges import Ranges, as_tensor, label
from ds_core.errors import CheckpointError
from ds_core.interfaces.checkpoint import CheckpointReader, digest
from ds_core.interfaces.logical import overlaps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ds_ckpt.stored import Key, Stored, StoredChunk, StoredTensor
    from ds_core.interfaces.logical import Chunk, LogicalTensor, Overlap, Piece

__all__ = ["StoredReader"]


class _Use(NamedTuple):
    """A piece that wants a part of a chunk."""

    piece: Piece
    parts: list[Overlap]


class StoredReader(CheckpointReader):
    """Reads each chunk that is needed once, checks it, and holds no more than that chunk beside what it fills."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self._ranges = Ranges(stored)

    @property
    def state(self) -> Mapping[str, Any]:
        return self.stored.state

    @property
    def world_size(self) -> int:
        return self.stored.world_size

    @property
    def identity(self) -> str:
        files = [(file.name, file.nbytes, file.checksum) for file in self.stored.files.values()]
        return digest(files, self.world_size, self.state, list(map(repr, self.tensors())))

    def rank_state(self, rank: int) -> Mapping[str, Any]:
        return self.stored.rank_states[rank] if self.stored.rank_states else {}

    def tensors(self) -> Sequence[LogicalTensor]:
        return [tensor.of for tensor in self.stored.tensors.values()]

    def read(self, wanted: Sequence[Piece]) -> None:
        import torch

        plan: dict[tuple[Key, Chunk], tuple[StoredTensor, StoredChunk, list[_Use]]] = {}
        for piece in wanted:
            tensor = self._find(piece)
            for chunk, use in self._uses(tensor, piece):
                plan.setdefault((tensor.key, chunk.chunk), (tensor, chunk, []))[2].append(use)
        with torch.no_grad():
            # The order of the file, so that disks read ahead.
            for tensor, chunk, uses in sorted(plan.values(), key=lambda item: (item[1].file, item[1].offset)):
                if len(uses) > 1 or not self._read_straight(tensor, chunk, uses[0]):
                    self._copy(tensor, chunk, uses)

    def close(self) -> None:
        self._ranges.close()

    def _find(self, piece: Piece) -> StoredTensor:
        of = piece.of
        stored = self.stored.tensors.get((of.name, of.kind, of.rank))
        if stored is None:
            raise CheckpointError(
                f"the checkpoint has no {label(of)}",
                where=str(self.stored.folder),
                fix="load it into the model that wrote it, or pass load_module_strict=False to leave it as it is",
            )
        if stored.of.shape != of.shape:
            raise CheckpointError(
                f"{label(of)} has shape {list(stored.of.shape)} in the checkpoint and {list(of.shape)} in the model",
                where=str(self.stored.folder),
                fix="load it into a model of the same sizes",
            )
        return stored

    def _uses(self, tensor: StoredTensor, piece: Piece) -> list[tuple[StoredChunk, _Use]]:
        found = []
        missing = piece.chunk.length
        for chunk in tensor.chunks:
            parts = list(overlaps(chunk.chunk, piece.chunk))
            if parts:
                found.append((chunk, _Use(piece, parts)))
                missing -= sum(part.numel for part in parts)
        if missing:
            raise CheckpointError(
                f"{label(tensor.of)}: the checkpoint has {piece.chunk.length - missing} of {piece.chunk.length} "
                "elements",
                where=str(self.stored.folder),
            )
        return found

    def _read_straight(self, tensor: StoredTensor, chunk: StoredChunk, use: _Use) -> bool:
        """Read ``chunk`` into the piece's own memory, if it lies there as it does in the file."""
        import torch

        piece, data = use.piece, use.piece.data.detach()
        low = max(chunk.chunk.offset, piece.chunk.offset)
        high = min(chunk.chunk.offset + chunk.chunk.length, piece.chunk.offset + piece.chunk.length)
        if (
            chunk.strides is not None
            or chunk.chunk.box != piece.chunk.box
            or data.device.type != "cpu"
            or data.dtype != getattr(torch, tensor.of.dtype)
            or not data.is_contiguous()
            # Only the whole of a chunk can be checked.
            or (chunk.checksum is not None and high - low != chunk.chunk.length)
        ):
            return False
        flat = data.view(-1)[low - piece.chunk.offset : high - piece.chunk.offset]
        target = flat.view(torch.uint8).numpy().data
        self._ranges.read_into(tensor, chunk, target, start=(low - chunk.chunk.offset) * data.element_size())
        return True

    def _copy(self, tensor: StoredTensor, chunk: StoredChunk, uses: Sequence[_Use]) -> None:
        source = as_tensor(self._ranges.view(tensor, chunk), tensor.of.dtype, chunk)
        for use in uses:
            for part in use.parts:
                _target(use.piece, part).copy_(_source(source, chunk, part))


def _source(data: Tensor, chunk: StoredChunk, part: Overlap) -> Tensor:
    span = part.source
    if chunk.strides is not None:
        # All of the box, which is its only span.
        return data[part.source_slices]
    return data[span.offset : span.offset + span.box.numel].view(span.box.size)[part.source_slices]


def _target(piece: Piece, part: Overlap) -> Tensor:
    span, data = part.target, piece.data.detach()
    if data.is_contiguous() or data.dim() == 1:
        flat = data.view(-1) if data.is_contiguous() else data
        return flat[span.offset : span.offset + span.box.numel].view(span.box.size)[part.target_slices]
    # A whole box that has its shape, and strides of its own.
    moved = zip(part.target_slices, span.box.start, piece.chunk.box.start, strict=True)
    return data[tuple(slice(s.start + at - first, s.stop + at - first) for s, at, first in moved)]
