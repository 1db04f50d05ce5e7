"""Inputs of a checkpointed call that are not kept as they are: a slice of them, on the host, in a buffer.

Note: memory order. A tensor is kept as its memory, flat, and seen again with its sizes and strides: a function that is
given a transposed tensor may do with it what it could not do with a contiguous one. One with gaps or overlaps in its
memory is kept without them.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ds_activation.copy_state import without_gaps
from ds_activation.host_copies import host_copies
from ds_activation.model_parallel import ALONE, Place
from ds_core.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ds_activation.host_copies import Handle

# torch 2.13 renamed it, and warns of the old name.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_BLOCK = 1024

__all__ = ["Buffers", "Keeping", "Kept", "gather", "is_activation", "part", "segment_numel"]


def is_activation(value: Any, mp_size: int) -> bool:
    """Return whether ``value`` is a tensor that may be divided over ``mp_size`` ranks or moved."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.numel() >= mp_size
        and not getattr(value, "no_checkpointing", False)
    )


def segment_numel(numel: int, mp_size: int) -> int:
    """Return the elements of one rank's slice; the last ones may reach beyond the end.

    >>> segment_numel(10, 4)
    3
    """
    return -(-numel // mp_size)


def part(flat: Tensor, place: Place) -> Tensor:
    """Return the slice of ``flat``, ``[N]``, that the rank owns, ``[ceil(N / size)]``: a view, or padded with zeros."""
    segment = segment_numel(flat.numel(), place.size)
    mine = flat[min(place.rank * segment, flat.numel()) : (place.rank + 1) * segment]
    if mine.numel() == segment:
        return mine
    padded = flat.new_zeros(segment)
    padded[: mine.numel()] = mine
    return padded


def gather(mine: Tensor, place: Place) -> Tensor:
    """Return the slices of all ranks of the group, ``[size * segment]``; all of them must call it.

    Raises:
        EngineError: the group is not there, or has another size.
    """
    if place.size == 1:
        return mine
    if not dist.is_initialized():
        raise EngineError(
            f"the mpu says {place.size} ranks, and there is no process group",
            where="partition_activations",
            fix="call ds_core.init_distributed() before the forward",
        )
    if (size := dist.get_world_size(place.group)) != place.size:
        raise EngineError(
            f"the mpu says {place.size} ranks, and its group has {size}",
            where="partition_activations",
            fix="let get_model_parallel_world_size() and get_model_parallel_group() say the same",
        )
    whole = mine.new_empty(place.size * mine.numel())
    # As bytes: not every backend moves every dtype.
    _ALL_GATHER(whole.view(torch.uint8), mine.contiguous().view(torch.uint8), group=place.group)
    return whole


class Buffers:
    """Memory made beforehand, by position of the argument and size of its slice, and used again."""

    everywhere: ClassVar[weakref.WeakSet[Buffers]] = weakref.WeakSet()
    """All of this process: those of ``configure``, and of each engine's section."""

    def __init__(self) -> None:
        self._pools: dict[tuple[object, ...], _Pool] = {}
        Buffers.everywhere.add(self)

    def put(self, values: Tensor, position: int, rows: int) -> _Row:
        """Return a row with a copy of ``values``, ``[N]``; it is free again when nobody holds it.

        Raises:
            ConfigError: all ``rows`` are in use.
        """
        key = (position, rows, values.numel(), values.dtype, values.device)
        if key not in self._pools:
            self._pools[key] = _Pool(values.new_empty(rows, values.numel()), list(reversed(range(rows))))
        row = _Row(self._pools[key], position)
        row.values.copy_(values)
        return row

    def clear(self) -> None:
        """Let go of the memory; rows in use stay with those who hold them."""
        self._pools.clear()


@dataclass
class _Pool:
    memory: Tensor
    free: list[int]


class _Row:
    def __init__(self, pool: _Pool, position: int) -> None:
        if not pool.free:
            rows = len(pool.memory)
            raise ConfigError(
                f"number_checkpoints is {rows}, and at least {rows + 1} checkpointed calls wait for their backward",
                where=f"activation_checkpointing.number_checkpoints, argument {position} of the call",
                fix=f"set it to {rows + 1} or more: it is the number of checkpointed calls between two backwards; "
                "after a forward that gets no backward, call checkpointing.reset()",
            )
        index = pool.free.pop()
        self.values = pool.memory[index]
        weakref.finalize(self, pool.free.append, index).atexit = False


class Kept(Protocol):
    """An input that waits for its recomputation."""

    def restore(self) -> Tensor:
        """Return the input, detached, with its ``requires_grad``. May be called again.

        Collective where the input is divided.

        Raises:
            EngineError: it was modified in place, or the ranks had different inputs.
        """


@dataclass(frozen=True, eq=False)
class _Moved:
    """The whole input, on the host."""

    handle: Handle
    requires_grad: bool

    def restore(self) -> Tensor:
        return self.handle.restore().requires_grad_(self.requires_grad)


@dataclass(frozen=True, eq=False)
class _Stored:
    """The memory of the input, or this rank's slice of it."""

    fetch: Callable[[], Tensor]
    """Returns what this rank has, flat; memory of its own, unless it is only part of the input."""
    size: Sequence[int]
    stride: Sequence[int]
    requires_grad: bool
    place: Place
    checksum: Tensor | None
    """Of the whole input, where it is to be compared with that of the other ranks."""
    compared: Callable[[], None]
    """Called once that was done."""

    def restore(self) -> Tensor:
        with torch.no_grad():
            flat = gather(self.fetch(), self.place)
            # Detached, so that autograd does not take it for a view that a function may not write to.
            tensor = flat.as_strided(self.size, self.stride).detach()
            # Those of all ranks, so that all of them raise: one alone would leave the others waiting for it.
            if self.checksum is not None and gather(self.checksum.view(1), self.place).unique().numel() > 1:
                raise EngineError(
                    "partition_activations divides inputs that every rank of the model-parallel group has alike, and "
                    "the ranks have different ones",
                    where=f"an input of sizes {tuple(self.size)} of a checkpointed call",
                    fix="leave partition_activations off where activations are divided already (sequence parallelism), "
                    "or set tensor.no_checkpointing = True on those",
                )
            self.compared()
        return tensor.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Keeping:
    """How inputs are kept."""

    place: Place = ALONE
    """Among those that each keep a slice."""
    on_host: bool = False
    buffers: Buffers | None = None
    """For what stays on the device; None: each slice has memory of its own."""
    rows: int = 0
    """Of each buffer."""
    checked: set[tuple[object, ...]] = field(default_factory=set)
    """Inputs (whose, position, sizes) for which it was checked once that the ranks have the same; added to."""

    def keep(self, tensor: Tensor, position: int, call: str = "") -> Kept | None:
        """Return ``tensor`` as it is kept; None where that is as it is, which is by reference.

        Args:
            tensor: never written to.
            position: its place among the tensors of the call.
            call: the name of what is called.

        Raises:
            ConfigError: there are not enough buffers.
        """
        # A parameter is there anyway; of a subclass only its author knows what its memory means.
        if type(tensor) is not Tensor or not is_activation(tensor, self.place.size):
            return None
        is_divided = self.place.size > 1
        if self.on_host and not is_divided:
            return _Moved(host_copies(tensor.device).to_host(tensor), tensor.requires_grad)
        if tensor.layout != torch.strided or not (is_divided or self.buffers is not None):
            return None
        with torch.no_grad():
            dense = without_gaps(tensor)
            flat = dense.as_strided((dense.numel(),), (1,))
            key = (call, position, tensor.shape)
            checksum = _checksum(flat) if is_divided and key not in self.checked else None
            fetch = self._stored(part(flat, self.place), position)
        compared = functools.partial(self.checked.add, key)
        return _Stored(fetch, dense.shape, dense.stride(), tensor.requires_grad, self.place, checksum, compared)

    def _stored(self, mine: Tensor, position: int) -> Callable[[], Tensor]:
        if self.on_host:
            # Copied, since a slice holds the whole. The host lends its memory by itself, so it needs no buffers.
            return host_copies(mine.device).to_host(mine.clone()).restore
        if self.buffers is not None:
            row = self.buffers.put(mine, position, self.rows)
            # Of one rank the row is the whole input, which the function may write to.
            return (lambda: row.values) if self.place.size > 1 else (lambda: row.values.clone())
        copied = mine.clone()
        return lambda: copied


def _checksum(flat: Tensor) -> Tensor:
    """Return a number of the bytes of ``flat`` that changes with the order of their blocks of 1 KiB, too."""
    data = flat.contiguous().view(torch.uint8)
    whole = data.numel() // _BLOCK * _BLOCK
    sums = torch.cat([data[:whole].view(-1, _BLOCK).sum(1, dtype=torch.int64), data[whole:].sum().view(1)])
    return (sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum()
