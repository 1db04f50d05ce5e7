"""Builds the tensors of a :class:`~ds_ckpt.stored.Stored` from references into storages. Pure: nothing is read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ds_ckpt.checks import Field, damaged, short
from ds_ckpt.formats.deepspeed.values import TensorRef
from ds_ckpt.stored import StoredChunk, StoredFile, StoredTensor
from ds_core.checkpoint.safetensors_format import ITEM_BYTES
from ds_core.interfaces.logical import Box, Chunk, LogicalTensor, logical_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ds_ckpt.formats.deepspeed.torchfile import TorchFile
    from ds_ckpt.stored import Key

__all__ = ["Builder", "Shape", "at_index", "flat_of", "ref_of", "shapes_of"]

Shape = tuple[int, ...]


def at_index(field: Field, index: int) -> Field | None:
    """Return the value of a dictionary whose keys are numbers, None where there is none."""
    inner: Any = field.object()
    return Field(inner[index], f"{field.way}[{index}]", *field.origin) if index in inner else None


def ref_of(field: Field) -> TensorRef:
    """Return the tensor in ``field``, or raise a CheckpointError."""
    if type(field.value) is not TensorRef:
        raise field.wrong("a tensor")
    return field.value


def flat_of(field: Field) -> TensorRef:
    """Return the one-dimensional tensor without gaps in ``field``, or raise a CheckpointError."""
    found = ref_of(field)
    if len(found.shape) != 1 or not found.is_row_by_row:
        raise field.wrong("a tensor of one dimension without gaps")
    return found


def shapes_of(field: Field) -> dict[str, Shape]:
    """Return parameter name -> shape of a dictionary of sizes, in its order."""
    found = {}
    for name, inner in field.items():
        if type(name) is not str or len(name) > 4096:
            raise field.wrong("names of parameters")
        if type(inner.value) not in (tuple, list):
            raise inner.wrong("a shape")
        sizes = tuple(inner.value)
        if len(sizes) > 64 or any(type(size) is not int or not 0 <= size < 2**62 for size in sizes):
            raise inner.wrong("a shape")
        if math.prod(sizes) >= 2**62:
            raise inner.wrong("a shape of fewer than 2**62 elements")
        found[name] = sizes
    return found


class Builder:
    """Collects tensors, each with the places of its elements, and checks that every element has one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[Key, StoredTensor] = {}
        self.files: dict[str, StoredFile] = {}

    def add_file(self, file: TorchFile) -> None:
        self.files[file.name] = StoredFile(file.name, file.nbytes, None)

    def add(self, name: str, kind: str, shape: Shape, dtype: str, chunks: Iterable[StoredChunk]) -> None:
        """Add a tensor whose ``chunks`` are in the order of its elements.

        Raises:
            CheckpointError: they are not all its elements, there is one of this name already, or no known dtype.
        """
        of = LogicalTensor(logical_name(name), kind, shape, dtype)
        stored = StoredTensor(of, tuple(chunks))
        held = sum(chunk.chunk.length for chunk in stored.chunks)
        label = f"{kind} {of.name!r}"
        if held != of.numel:
            raise damaged(
                f"{label} of shape {short(list(shape))}: {held} of {of.numel} elements are there", self.folder
            )
        if stored.key in self.tensors:
            raise damaged(f"{label} is there twice", self.folder)
        if dtype not in ITEM_BYTES:
            raise damaged(f"{label} has dtype {dtype}, which cannot be read", self.folder)
        self.tensors[stored.key] = stored

    def add_whole(self, name: str, kind: str, ref: TensorRef, shape: Shape | None = None) -> None:
        """Add a tensor that is one view of a storage; ``shape`` in place of its own if it has no gaps."""
        chosen = ref.shape if shape is None or not ref.is_row_by_row else shape
        strides = None if ref.is_row_by_row else ref.strides
        chunk = StoredChunk(
            Chunk(Box((0,) * len(chosen), chosen), 0, ref.numel),
            ref.file,
            ref.start_byte,
            ref.span_nbytes,
            None,
            strides,
        )
        self.add(name, kind, chosen, ref.dtype, [chunk])

    def add_concatenated(
        self, kind: str, params: Mapping[str, Shape], parts: Sequence[TensorRef], where: Field
    ) -> None:
        """Add tensors that lie one after the other in ``parts``, themselves thought of as one after the other.

        Any of them may straddle parts; what is behind the last one is padding.
        """
        cutter = _Cutter(parts)
        for name, shape in params.items():
            chunks = cutter.take(shape)
            if chunks is None:
                raise where.wrong(f"as many elements as {kind} {short(name)} and those before it have")
            self.add(name, kind, shape, _dtype_of(parts, where), chunks)

    def add_slices(self, kind: str, params: Mapping[str, Shape], ranks: Sequence[TensorRef], where: Field) -> None:
        """Add tensors each cut into equal slices, one per rank, padded; a rank's slices lie one after the other."""
        at, world = 0, len(ranks)
        for name, shape in params.items():
            numel = math.prod(shape)
            each = -(-numel // world)
            chunks = []
            for rank, ref in enumerate(ranks):
                if at + each > ref.numel:
                    raise where.wrong(f"as many elements as {kind} {short(name)} and those before it have")
                start, end = min(rank * each, numel), min((rank + 1) * each, numel)
                if end > start:
                    chunks.append(_part(ref, shape, start, at, end - start))
            self.add(name, kind, shape, _dtype_of(ranks, where), chunks or [_empty(ranks[0], shape)])
            at += each
        if any(ref.numel != at for ref in ranks):
            raise where.wrong(f"{at} elements on each rank")


class _Cutter:
    """Takes tensor after tensor from parts that follow each other."""

    def __init__(self, parts: Sequence[TensorRef]) -> None:
        self.parts, self.index, self.at = parts, 0, 0

    def take(self, shape: Shape) -> list[StoredChunk] | None:
        """Return the chunks of the next tensor, or None where the parts end before it does."""
        chunks: list[StoredChunk] = []
        done, numel = 0, math.prod(shape)
        while done < numel:
            if self.index >= len(self.parts):
                return None
            part = self.parts[self.index]
            count = min(numel - done, part.numel - self.at)
            if count:
                chunks.append(_part(part, shape, done, self.at, count))
            done += count
            self.at += count
            if self.at == part.numel:
                self.index, self.at = self.index + 1, 0
        return chunks or ([_empty(self.parts[0], shape)] if self.parts else None)


def _part(ref: TensorRef, shape: Shape, start: int, at: int, count: int) -> StoredChunk:
    """Return ``count`` elements from ``at`` of ``ref`` as those from ``start`` of a tensor of ``shape``."""
    item_bytes = ITEM_BYTES.get(ref.dtype, 1)
    box = Box((0,) * len(shape), shape)
    return StoredChunk(Chunk(box, start, count), ref.file, ref.start_byte + at * item_bytes, count * item_bytes)


def _empty(ref: TensorRef, shape: Shape) -> StoredChunk:
    return StoredChunk(Chunk(Box((0,) * len(shape), shape), 0, 0), ref.file, ref.start_byte, 0)


def _dtype_of(parts: Sequence[TensorRef], where: Field) -> str:
    found: set[Any] = {part.dtype for part in parts}
    if len(found) != 1:
        raise where.wrong(f"one dtype on all ranks, not {', '.join(sorted(found))}")
    return str(found.pop())
