"""The weights in a checkpoint, whatever format it has: which there are, who shares one, their elements. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ds_ckpt.casting import BITS, TARGETS, cast, is_floating
from ds_ckpt.checks import damaged, short
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import BUFFER, MASTER, WEIGHT, Chunk, logical_name, overlaps
from ds_core.log import logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ds_ckpt.casting import Array
    from ds_ckpt.ranges import Ranges
    from ds_ckpt.stored import Stored, StoredChunk, StoredTensor

__all__ = ["Weight", "Weights", "read_array", "shared_names", "weights_of"]

_BLOCK = 2**18
"""Elements that are cast at a time."""


@dataclass(frozen=True)
class Weight:
    """A weight or buffer, and what it is wanted as."""

    stored: StoredTensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.of.shape

    def read(self, ranges: Ranges) -> tuple[Array, bool]:
        """Return all elements, flat, in the form of ``casting.BITS``; and whether one became infinite."""
        values, source = read_array(ranges, self.stored), self.stored.of.dtype
        return cast(values, source, self.dtype) if source != self.dtype else (values, False)

    def blocks(self, ranges: Ranges) -> Iterator[tuple[Array, bool]]:
        """Yield what :meth:`read` returns in parts, so that the elements are in memory once, not twice."""
        values, source = read_array(ranges, self.stored), self.stored.of.dtype
        if source == self.dtype:
            yield values, False
            return
        for start in range(0, len(values), _BLOCK):
            yield cast(values[start : start + _BLOCK], source, self.dtype)


@dataclass(frozen=True)
class Weights:
    """The weights of a checkpoint by name, in the order they are stored in."""

    by_name: Mapping[str, Weight]
    shared: Mapping[str, str]
    """Alias -> the name its weight is stored under."""


def weights_of(stored: Stored, dtype: str | None, *, exclude_frozen: bool = False) -> Weights:
    """Return the weights and persistent buffers of a checkpoint.

    Args:
        stored: the checkpoint.
        dtype: one of ``TARGETS``: what floating ones are wanted as, from masters where there are any; None: as the
            model has them.
        exclude_frozen: leave out the weights that are not trained.

    Raises:
        CheckpointError: it is not known which weights are trained.
    """
    kinds = (WEIGHT, MASTER, BUFFER) if dtype is None else (MASTER, WEIGHT, BUFFER)
    frozen = _frozen(stored) if exclude_frozen else frozenset()
    found = {}
    for name in dict.fromkeys(name for name, _, _ in stored.tensors):
        tensor = next(
            (stored.tensors[name, kind, None] for kind in kinds if (name, kind, None) in stored.tensors), None
        )
        if tensor is not None and name not in frozen:
            found[name] = Weight(tensor, _wanted(tensor, dtype, stored))
    missing = sorted(set(_names(stored, "excluded") or ()) - found.keys() - frozen)
    if missing:
        logger.warning(
            "%d weights, such as %r, are not in the checkpoint: they were left out when it was saved",
            len(missing),
            missing[0],
        )
    shared = {alias: name for alias, name in shared_names(stored).items() if name in found and alias not in found}
    return Weights(found, shared)


def _wanted(tensor: StoredTensor, dtype: str | None, stored: Stored) -> str:
    own = tensor.of.dtype
    if not is_floating(own):
        return own
    if dtype is None and tensor.of.kind == MASTER:
        # The weight itself is not stored, but what the model has it in.
        plan = stored.state.get("plan")
        word = plan.get("stored") if isinstance(plan, dict) else None
        return word if word in TARGETS else own
    return dtype or own


def _frozen(stored: Stored) -> frozenset[str]:
    names = _names(stored, "frozen")
    if names is None:
        raise CheckpointError(
            "the checkpoint does not say which weights are trained",
            where=str(stored.folder),
            fix="export all of them",
        )
    return frozenset(names)


def _names(stored: Stored, key: str) -> list[str] | None:
    value: Any = stored.state.get(key)
    if value is not None and (not isinstance(value, list) or not all(isinstance(name, str) for name in value)):
        raise damaged(f"state.{key}: expected names, found {short(value)}", stored.folder)
    return value


def shared_names(stored: Stored) -> dict[str, str]:
    """Return alias -> the name its weight is stored under."""
    value: Any = stored.state.get("shared", {})
    if not isinstance(value, dict) or not all(isinstance(name, str) for item in value.items() for name in item):
        raise damaged(f"state.shared: expected alias -> name, found {short(value)}", stored.folder)
    return {logical_name(alias): logical_name(name) for alias, name in value.items()}


def read_array(ranges: Ranges, tensor: StoredTensor) -> Array:
    """Return the elements of a tensor, flat, row by row, in the form of ``casting.BITS``; checksums are checked.

    Raises:
        CheckpointError: its bytes are not what was written; it does not fit into memory.
    """
    of, whole = tensor.of, Chunk.whole(tensor.of.shape)
    try:
        found = np.empty(of.numel, BITS[of.dtype])
    except (MemoryError, ValueError) as error:
        raise CheckpointError(
            f"{of.kind} {of.name!r} of {list(of.shape)} elements of {of.dtype} does not fit into memory",
            fix="read it on a machine with more memory",
        ) from error
    for chunk in tensor.chunks:
        if not chunk.chunk.length:
            continue
        if chunk.strides is None and chunk.chunk.box == whole.box:
            part = found[chunk.chunk.offset : chunk.chunk.offset + chunk.chunk.length]
            ranges.read_into(tensor, chunk, part.view(np.uint8).data)
        else:
            _place(found.reshape(of.shape), chunk, np.frombuffer(ranges.view(tensor, chunk), BITS[of.dtype]))
    return found


def _place(full: Array, chunk: StoredChunk, data: Array) -> None:
    """Copy the elements of a chunk to where they belong."""
    if chunk.strides is not None:
        strides = [stride * data.itemsize for stride in chunk.strides]
        view = np.lib.stride_tricks.as_strided(data, chunk.chunk.box.size, strides, writeable=False)
    for part in overlaps(chunk.chunk, Chunk.whole(full.shape)):
        span = part.source
        if chunk.strides is None:
            view = data[span.offset : span.offset + span.box.numel].reshape(span.box.size)
        full[part.target_slices] = view[part.source_slices]
