"""Compares two checkpoints of any formats, tensor by tensor and key by key, a block of elements at a time. No torch.

Note: equal. Numbers are equal as numbers: NaN equals NaN, -0.0 equals 0.0. Where dtypes differ, both are compared as
float64. Where both checkpoints have the same checksum for the same part of a tensor, it is not read.

Note: masters. A checkpoint of DeepSpeed's at stage 3 has no weights in 16 bits, only the masters they are cast from.
Where one checkpoint has both and the other the master alone, its weight is the master, cast.

Note: stages. The stage says how the ranks that saved had divided among them what is stored, like their number, and is
nothing that training goes on from. Inside an accumulation window it is: gradients are those of a rank at its stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ds_ckpt.casting import BITS, TARGETS, cast, is_floating
from ds_ckpt.checks import short
from ds_ckpt.ranges import Ranges
from ds_core.checkpoint.jsonable import leaves
from ds_core.interfaces.logical import MASTER, WEIGHT, overlaps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ds_ckpt.casting import Array
    from ds_ckpt.stored import Stored, StoredChunk, StoredTensor
    from ds_core.interfaces.logical import LogicalTensor

__all__ = ["Difference", "StateDifference", "TensorDifference", "compare"]

_BLOCK = 2**18
"""Elements that are compared at a time: a few MiB in float64."""
_SAME_VALUES = {WEIGHT: MASTER, MASTER: WEIGHT}


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not the same in both."""

    a: LogicalTensor | None
    """As the first checkpoint has it; None: it has none."""
    b: LogicalTensor | None
    count: int = 0
    """Elements that differ; 0 also where the shapes do, and nothing was compared."""
    largest: float = 0.0
    """The largest absolute difference; inf where one of the two is infinite or NaN."""
    relative: float = 0.0
    """The largest difference divided by the larger magnitude of the two."""

    @property
    def of(self) -> LogicalTensor:
        """What is compared, as one of the two has it."""
        found = self.a or self.b
        assert found is not None
        return found


@dataclass(frozen=True)
class StateDifference:
    """A key of the state that is not the same in both."""

    path: str
    """Dotted; ``rank_state[2]. ...`` is what rank 2 saved of its own."""
    a: str | None
    """The first one's value in few characters; None: it has no such key."""
    b: str | None


@dataclass(frozen=True)
class Difference:
    """What differs between two checkpoints."""

    tensors: tuple[TensorDifference, ...]
    state: tuple[StateDifference, ...]
    compared: int
    """Tensors that both have."""
    nbytes: int
    """Bytes of those in the first one whose values were compared."""
    unread: int
    """Of these, bytes that were not read because their checksums are equal."""

    @property
    def is_empty(self) -> bool:
        return not self.tensors and not self.state


def compare(
    a: Stored,
    b: Stored,
    *,
    tolerance: float = 0.0,
    read: bool = False,
    with_state: bool = True,
    progress: Callable[[int, int], object] | None = None,
) -> Difference:
    """Return what differs between ``a`` and ``b``; in what format, on how many ranks and at what stage does not count.

    A weight of one and a master of the other are compared where neither has its own counterpart: a master is the
    weight before it was cast. Where one has both and the other the master alone, the weight is compared with that
    master, cast.

    Args:
        a: a checkpoint.
        b: another one.
        tolerance: numbers whose absolute or relative difference is at most this are equal; of the state, floats.
        read: read everything, also where checksums are equal.
        with_state: compare counters, options and client state, and of equally many ranks what each has of its own.
        progress: told how many bytes of how many were compared since the last time.

    Raises:
        CheckpointError: bytes are not what was written, or a file cannot be read.
    """
    pairs = list(_pairs(a, b))
    total = sum(_nbytes(one) for one, two, _ in pairs if one and two and one.of.shape == two.of.shape)
    comparing = _Comparing(a, b, tolerance, read, lambda count: progress(count, total) if progress else None)
    try:
        found = [comparing.tensors(pair) for pair in pairs]
    finally:
        comparing.close()
    return Difference(
        tuple(difference for difference in found if difference is not None),
        tuple(_states(a, b, tolerance)) if with_state else (),
        sum(pair.one is not None and pair.two is not None for pair in pairs),
        total,
        comparing.unread,
    )


class _Pair(NamedTuple):
    one: StoredTensor | None
    two: StoredTensor | None
    dtype: str | None = None
    """What both are cast to before they are compared; None: nothing."""


def _pairs(a: Stored, b: Stored) -> Iterator[_Pair]:
    """Yield the tensors of ``a`` with their counterparts in ``b``, then those that ``b`` alone has."""
    left = {key: tensor for key, tensor in b.tensors.items() if key not in a.tensors}
    for (name, kind, rank), tensor in a.tensors.items():
        other = b.tensors.get((name, kind, rank))
        if other is None and kind in _SAME_VALUES:
            other = left.pop((name, _SAME_VALUES[kind], rank), None)
        master = _master_for(tensor, a, b) if other is None else None
        yield _Pair(tensor, other) if master is None else _Pair(tensor, master, tensor.of.dtype)
    for tensor in left.values():
        master = _master_for(tensor, b, a)
        yield _Pair(None, tensor) if master is None else _Pair(master, tensor, tensor.of.dtype)


def _master_for(weight: StoredTensor, own: Stored, other: Stored) -> StoredTensor | None:
    """Return the master in ``other`` that says what ``weight`` of ``own`` is there; None where there is none."""
    name, kind, rank = weight.key
    key = (name, MASTER, rank)
    if kind != WEIGHT or weight.of.dtype not in TARGETS or key not in own.tensors:
        return None
    found = other.tensors.get(key)
    return found if found is not None and is_floating(found.of.dtype) else None


def _nbytes(tensor: StoredTensor) -> int:
    return tensor.of.numel * np.dtype(BITS[tensor.of.dtype]).itemsize


class _Comparing:
    """The files of two checkpoints while their tensors are compared."""

    def __init__(self, a: Stored, b: Stored, tolerance: float, read: bool, progress: Callable[[int], object]) -> None:
        self._a, self._b = Ranges(a), Ranges(b)
        self._tolerance, self._read, self._progress = tolerance, read, progress
        self.unread = 0

    def close(self) -> None:
        self._a.close()
        self._b.close()

    def tensors(self, pair: _Pair) -> TensorDifference | None:
        one, two, dtype = pair
        if one is None or two is None or one.of.shape != two.of.shape:
            return TensorDifference(one.of if one else None, two.of if two else None)
        count, largest, relative = 0, 0.0, 0.0
        dtypes = (one.of.dtype, two.of.dtype) if dtype is None else (dtype, dtype)
        for x, y in self._blocks(one, two):
            self._progress(len(x) * x.itemsize)
            if dtype is not None:
                x, y = cast(x, one.of.dtype, dtype)[0], cast(y, two.of.dtype, dtype)[0]
            found = _differences(x, y, *dtypes, self._tolerance)
            count += found[0]
            largest, relative = max(largest, found[1]), max(relative, found[2])
        if not count and dtypes[0] == dtypes[1]:
            return None
        return TensorDifference(one.of, two.of, count, largest, relative)

    def _blocks(self, one: StoredTensor, two: StoredTensor) -> Iterator[tuple[Array, Array]]:
        """Yield all elements of both side by side, flat, in the form of ``casting.BITS``, but for those known equal."""
        same = {chunk.chunk: chunk for chunk in two.chunks}
        for first in one.chunks:
            # A chunk that both have shares elements with no other one.
            second = same.get(first.chunk)
            if second is None:
                for other in two.chunks:
                    yield from self._parts(one, first, two, other)
            elif self._is_known(one, first, two, second):
                self.unread += first.nbytes
                self._progress(first.nbytes)
            else:
                yield from self._parts(one, first, two, second)

    def _is_known(self, one: StoredTensor, first: StoredChunk, two: StoredTensor, second: StoredChunk) -> bool:
        """Return whether the chunks are the same by their checksums."""
        return (
            not self._read
            and one.of.dtype == two.of.dtype
            and first.checksum is not None
            and (first.checksum, first.nbytes, first.strides) == (second.checksum, second.nbytes, second.strides)
        )

    def _parts(
        self, one: StoredTensor, first: StoredChunk, two: StoredTensor, second: StoredChunk
    ) -> Iterator[tuple[Array, Array]]:
        x = y = None
        for part in overlaps(first.chunk, second.chunk):
            if x is None or y is None:
                x, y = self._elements(self._a, one, first), self._elements(self._b, two, second)
            left = _box(x, first, part.source.offset, part.source.box.size)[part.source_slices]
            right = _box(y, second, part.target.offset, part.target.box.size)[part.target_slices]
            yield from _side_by_side(left, right)

    def _elements(self, ranges: Ranges, tensor: StoredTensor, chunk: StoredChunk) -> Array:
        """Return what is stored of a chunk: flat, or of its box's shape where it has strides."""
        data: Array = np.frombuffer(ranges.view(tensor, chunk), BITS[tensor.of.dtype])
        if chunk.strides is None:
            return data
        strides = [stride * data.itemsize for stride in chunk.strides]
        return np.lib.stride_tricks.as_strided(data, chunk.chunk.box.size, strides, writeable=False)


def _box(data: Array, chunk: StoredChunk, offset: int, size: tuple[int, ...]) -> Array:
    """Return a dense box of a chunk, whose elements are from ``offset``; with strides the chunk is that box."""
    return data if chunk.strides is not None else data[offset : offset + math.prod(size)].reshape(size)


def _side_by_side(x: Array, y: Array) -> Iterator[tuple[Array, Array]]:
    """Yield the elements of two arrays of one shape in blocks, whatever strides they have."""
    blocks = np.nditer(
        [x, y],
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_flags=[["readonly", "aligned"], ["readonly", "aligned"]],
        order="C",
        buffersize=_BLOCK,
    )
    with blocks:
        yield from blocks


def _differences(x: Array, y: Array, dtype_x: str, dtype_y: str, tolerance: float) -> tuple[int, float, float]:
    """Return how many elements differ, and the largest absolute and relative difference among those."""
    if dtype_x == dtype_y and np.array_equal(x, y):
        return 0, 0.0, 0.0
    p, q = _numbers(x, dtype_x), _numbers(y, dtype_y)
    with np.errstate(invalid="ignore", over="ignore"):
        gap, size = np.abs(p - q), np.maximum(np.abs(p), np.abs(q))
        if dtype_x == dtype_y and _is_whole(dtype_x):
            # Exactly, also beyond 2**53: unsigned numbers wrap around.
            gap = (np.maximum(x, y).astype("u8") - np.minimum(x, y).astype("u8")).astype("f8")
            differs = x != y
        else:
            differs = (p != q) & ~(np.isnan(p) & np.isnan(q))
        gap = np.where(np.isnan(gap), np.inf, gap)
        if tolerance:
            differs &= ~(np.isfinite(gap) & (gap <= tolerance * np.maximum(1.0, size)))
        if not differs.any():
            return 0, 0.0, 0.0
        gap, size = gap[differs], size[differs]
        # A gap that is infinite has no finite size to be divided by.
        relative = np.where(np.isfinite(gap), gap / size, np.inf)
    return len(gap), float(gap.max()), float(relative.max())


def _is_whole(dtype: str) -> bool:
    return not is_floating(dtype) and not dtype.startswith("complex")


def _numbers(values: Array, dtype: str) -> Array:
    """Return ``values``, in the form of ``casting.BITS``, as float64 or complex128."""
    if dtype.startswith("complex"):
        return values.astype("c16")
    if is_floating(dtype) and dtype != "float64":
        values = cast(values, dtype, "float32")[0]
    with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN
        return values.astype("f8")


def _states(a: Stored, b: Stored, tolerance: float) -> Iterator[StateDifference]:
    left, right = dict(a.state), dict(b.state)
    if not left.get("in_window") and not right.get("in_window"):
        left.pop("stage", None)
        right.pop("stage", None)
    yield from _differing_leaves(left, right, "", tolerance)
    if len(a.rank_states) == len(b.rank_states):
        for rank, (one, two) in enumerate(zip(a.rank_states, b.rank_states, strict=True)):
            yield from _differing_leaves(one, two, f"rank_state[{rank}]", tolerance)


def _differing_leaves(
    a: Mapping[str, Any], b: Mapping[str, Any], path: str, tolerance: float
) -> Iterator[StateDifference]:
    one, two = dict(leaves(dict(a), path)), dict(leaves(dict(b), path))
    for way in dict.fromkeys([*one, *two]):
        if _is_filled(way, one, two) or _is_filled(way, two, one):
            # What is in it there is told; that it is not empty there is the same change.
            continue
        if way not in two:
            yield StateDifference(way, _in_words(one[way]), None)
        elif way not in one:
            yield StateDifference(way, None, _in_words(two[way]))
        elif not _is_equal(one[way], two[way], tolerance):
            yield StateDifference(way, _in_words(one[way]), _in_words(two[way]))


def _is_filled(way: str, of: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether ``of`` has nothing in what is at ``way``, and ``other`` has something."""
    value = of.get(way)
    if way in other or not isinstance(value, (dict, list)) or "shape" in value:
        return False
    inside = (f"{way}.", f"{way}[") if way else ""
    return any(path.startswith(inside) for path in other)


def _is_equal(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, float) and isinstance(b, float) and a != b:
        is_close = math.isfinite(a - b) and abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))
        return is_close or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


def _in_words(value: Any) -> str:
    if isinstance(value, dict) and "shape" in value:  # the only leaf with keys: a tensor, as it is encoded
        return f"tensor {short(value.get('shape'))} {short(value.get('dtype'))}"
    return short(value)
