"""Weights and buffers whole on rank 0, one at a time, from whatever pieces the ranks hold."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from ds_core.checkpoint.safetensors_format import Entry
from ds_core.comm import all_or_none, raise_together, values_of_ranks
from ds_core.errors import CheckpointError, CommError
from ds_core.interfaces.logical import BUFFER, MASTER, WEIGHT, Chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from ds_core.interfaces.logical import LogicalTensor, Piece

__all__ = ["Gathering", "on_rank_0"]

BLOCK_BYTES = 32 * 2**20
"""Of a message at most."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Held:
    """A chunk of a tensor and the rank that gives it."""

    chunk: Chunk
    rank: int


@dataclass(frozen=True)
class _Source:
    of: LogicalTensor
    dtype: torch.dtype
    """What it is cast to."""
    held: Sequence[_Held]


class Gathering:
    """The weights and buffers that the ranks hold together, to be collected on rank 0 of the group.

    Args:
        pieces: what this rank holds, as from ``Partition.pieces()``.
        group: the ranks that hold them.
        device: where this rank's collectives take tensors.
        dtype: what floating tensors are cast to, from masters where there are any; None: weights as the model has
            them.
        stored: name -> dtype of the model's parameter, for those of which there are only masters.
        exclude: names to leave out.
        where: the caller, for errors.
        arguments: must be equal on all ranks.

    Raises:
        CheckpointError: on every rank: the arguments differ, or the pieces are not the whole.
    """

    def __init__(
        self,
        pieces: Iterable[Piece],
        group: ProcessGroup,
        device: torch.device,
        *,
        dtype: torch.dtype | None,
        stored: Mapping[str, torch.dtype],
        exclude: Iterable[str],
        where: str,
        arguments: object = None,
    ) -> None:
        import torch.distributed as dist

        self.group, self.device = group, device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.failure: Exception | None = None
        """What went wrong on this rank; the collectives go on, so that no rank waits for another."""
        self.beyond: list[str] = []
        """Tensors with finite values that became infinite when this rank cast them."""
        excluded = set(exclude)
        self._mine: dict[tuple[str, str, Chunk], Piece] = {
            (piece.of.name, piece.of.kind, piece.chunk): piece
            for piece in pieces
            if piece.of.kind in (WEIGHT, MASTER, BUFFER) and piece.of.name not in excluded
        }
        table = [(piece.of, piece.chunk, piece.writer) for piece in self._mine.values()]
        tables = values_of_ranks((arguments, table), group)
        differing = [rank for rank, (theirs, _) in enumerate(tables) if theirs != tables[0][0]]
        if differing:
            raise CheckpointError(
                f"ranks pass different arguments: rank {differing[0]} {tables[differing[0]][0]!r}, "
                f"rank 0 {tables[0][0]!r}",
                where=where,
                fix="pass the same on every rank",
            )
        self._sources = _sources([rows for _, rows in tables], dtype, stored, where)
        # What is sent and received where the content is not to be had or cannot be kept. Made before any message is
        # announced, so that none of them depends on memory that may not be there.
        sent = [
            held.chunk.length * source.dtype.itemsize
            for source in self._sources.values()
            for held in source.held
            if held.rank != 0
        ]
        nbytes = max(1, min(BLOCK_BYTES, max(sent, default=0)))
        self._buffer = all_or_none(lambda: torch.zeros(nbytes, dtype=torch.uint8, device=device), group)

    @property
    def entries(self) -> list[Entry]:
        """All tensors as they will be collected, the same on every rank."""
        return [
            Entry(name, str(source.dtype).removeprefix("torch."), source.of.shape)
            for name, source in self._sources.items()
        ]

    def collect(self, name: str) -> Tensor | None:
        """Return a tensor whole on rank 0, in host memory, None on the others. Collective; blocks.

        What is there as it is wanted, in host memory on rank 0, is not copied. After a failure of this rank the
        content is undefined; see :attr:`failure`.
        """
        source = self._sources[name]
        if self.rank == 0 and [held.rank for held in source.held] == [0] and source.held[0].chunk.is_whole_box:
            return self._or_fail(lambda: self._own(source, source.held[0]).reshape(source.of.shape).to("cpu"))
        full = self._or_fail(lambda: torch.empty(source.of.shape, dtype=source.dtype)) if self.rank == 0 else None
        for held in source.held:
            data: Tensor | None = None
            if held.rank == self.rank:
                data = self._or_fail(lambda held=held: self._own(source, held))  # type: ignore[misc]
                if self.rank != 0:
                    self._send(source, held, data)
            elif self.rank == 0:
                data = self._receive(source, held, full)
            if full is not None and data is not None:
                self._or_fail(lambda held=held, data=data: _place(full, held.chunk, data))  # type: ignore[misc]
        return full

    def agree(self) -> list[str]:
        """Return the names in :attr:`beyond` of all ranks. Collective.

        Raises:
            DsError: on every rank, if one failed.
        """
        raise_together(self.failure, self.group)
        return sorted({name for names in values_of_ranks(self.beyond, self.group) for name in names})

    def _own(self, source: _Source, held: _Held) -> Tensor:
        """Return the elements of a chunk of this rank's, flat, in the dtype wanted."""
        data = self._mine[source.of.name, source.of.kind, held.chunk].data.detach().reshape(-1)
        cast = data.to(source.dtype).contiguous()
        if _is_narrower(source.dtype, data.dtype) and _became_infinite(data, cast):
            self.beyond.append(source.of.name)
        return cast

    def _or_fail(self, work: Callable[[], _T]) -> _T | None:
        """Return what ``work`` returns, None after a failure, such as a device without memory.

        The messages that were announced are exchanged all the same: the other side waits for them.
        """
        try:
            return work()
        except Exception as error:
            self.failure = self.failure or error
            return None

    def _blocks(self, nbytes: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the start of each message of a chunk, and as much of the buffer as it has bytes."""
        for start in range(0, nbytes, self._buffer.numel()):
            yield start, self._buffer[: min(self._buffer.numel(), nbytes - start)]

    def _send(self, source: _Source, held: _Held, data: Tensor | None) -> None:
        import torch.distributed as dist

        # Bytes, since gloo does not know every dtype.
        whole = None if data is None else self._or_fail(lambda: data.view(torch.uint8))
        is_here = whole is not None and whole.device == self._buffer.device
        for start, buffer in self._blocks(held.chunk.length * source.dtype.itemsize):
            block = buffer
            if whole is not None:
                part = whole[start : start + buffer.numel()]
                block = part if is_here else buffer.copy_(part)
            with _telling_of_lost_ranks():
                dist.send(block, group=self.group, group_dst=0)

    def _receive(self, source: _Source, held: _Held, full: Tensor | None) -> Tensor | None:
        """Receive a chunk; into its place, where that is one interval, else return it."""
        import torch.distributed as dist

        chunk = held.chunk
        is_interval = chunk.box == Chunk.whole(source.of.shape).box
        target: Tensor | None = None
        if full is not None and is_interval:
            target = full.view(-1)[chunk.offset : chunk.offset + chunk.length]
        elif full is not None:
            target = self._or_fail(lambda: torch.empty(chunk.length, dtype=source.dtype))
        whole = None if target is None else target.view(torch.uint8)
        for start, buffer in self._blocks(chunk.length * source.dtype.itemsize):
            into = None if whole is None else whole[start : start + buffer.numel()]
            # What cannot be kept is received and dropped.
            block = into if into is not None and self.device.type == "cpu" else buffer
            with _telling_of_lost_ranks():
                dist.recv(block, group=self.group, group_src=held.rank)
            if into is not None and block is buffer:
                into.copy_(buffer)
        return None if is_interval else target


@contextmanager
def _telling_of_lost_ranks() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CommError(
            f"the weights cannot be gathered, a rank is gone: {error}", fix="see why that rank ended"
        ) from error


def on_rank_0(
    gathering: Gathering, entries: Sequence[Entry], work: Callable[[Callable[[Entry], Tensor]], None]
) -> None:
    """Let rank 0 do ``work`` with tensors that all ranks collect. Collective.

    Args:
        gathering: of the same tensors on every rank.
        entries: which, in the order in which ``work`` takes them; the same on every rank.
        work: called on rank 0 with a function that returns the next of ``entries`` whole.

    Raises:
        DsError: on every rank: a rank failed, with its reason.
    """
    waiting = iter(entries)

    def take(entry: Entry) -> Tensor:
        following = next(waiting)
        assert following == entry, f"{entry} is taken before {following}"
        found = gathering.collect(entry.name)
        if gathering.failure is not None:
            raise gathering.failure
        assert found is not None
        return found

    if gathering.rank == 0:
        try:
            work(take)
        except CommError:
            raise  # a rank is gone: there is nobody to take the rest from
        except Exception as error:
            gathering.failure = gathering.failure or error
    # The other ranks give all; rank 0 what is left after a failure, since they are waiting for it to take theirs.
    for entry in waiting:
        gathering.collect(entry.name)
    raise_together(gathering.failure, gathering.group)


def _sources(
    tables: Sequence[Sequence[tuple[LogicalTensor, Chunk, int]]],
    dtype: torch.dtype | None,
    stored: Mapping[str, torch.dtype],
    where: str,
) -> dict[str, _Source]:
    """Return what to collect, by name: the best kind of each, and who gives which chunk of it."""
    known: dict[tuple[str, str], LogicalTensor] = {}
    written: dict[tuple[str, str], dict[Chunk, int]] = {}
    first: dict[tuple[str, str], set[Chunk]] = {}
    for rank, rows in enumerate(tables):
        for of, chunk, writer in rows:
            key = (of.name, of.kind)
            known.setdefault(key, of)
            if writer == rank:
                written.setdefault(key, {}).setdefault(chunk, rank)
            if rank == 0:
                first.setdefault(key, set()).add(chunk)
    kinds = (WEIGHT, MASTER, BUFFER) if dtype is None else (MASTER, WEIGHT, BUFFER)
    found = {}
    for name in dict.fromkeys(name for name, _ in known):
        kind = next(kind for kind in kinds if (name, kind) in known)
        of = known[name, kind]
        own: torch.dtype = getattr(torch, of.dtype)
        wanted = dtype or (stored.get(name, own) if kind == MASTER else own)
        # What rank 0 has itself nobody needs to send.
        here, whole = first.get((name, kind), set()), Chunk.whole(of.shape)
        chunks = {whole: 0} if whole in here else written.get((name, kind), {})
        held = [
            _Held(chunk, 0 if chunk in here else rank) for chunk, rank in chunks.items() if chunk.length or not of.numel
        ]
        count = sum(one.chunk.length for one in held)
        if count != of.numel:
            raise CheckpointError(
                f"the ranks hold {count} of {of.numel} elements of {kind} {name!r}",
                where=where,
                fix="this is a bug of the partition: each element has one writer",
            )
        found[name] = _Source(of, wanted if own.is_floating_point else own, held)
    return found


def _place(full: Tensor, chunk: Chunk, data: Tensor) -> None:
    if chunk.box.size == tuple(full.shape):
        full.view(-1)[chunk.offset : chunk.offset + chunk.length] = data
        return
    for span in chunk.spans():
        index = tuple(slice(at, at + size) for at, size in zip(span.box.start, span.box.size, strict=True))
        full[index] = data[span.offset : span.offset + span.box.numel].view(span.box.size)


def _is_narrower(target: torch.dtype, source: torch.dtype) -> bool:
    """Return whether ``source`` has finite values that ``target`` does not."""
    return source.is_floating_point and torch.finfo(target).max < torch.finfo(source).max


def _became_infinite(data: Tensor, cast: Tensor) -> bool:
    """Return whether a finite value of ``data`` is infinite in ``cast``."""
    # Without temporary tensors, unless there is something to look for.
    if not cast.numel() or all(bool(value.isfinite()) for value in cast.aminmax()):
        return False
    return bool((cast.isinf() & ~data.isinf()).any())
