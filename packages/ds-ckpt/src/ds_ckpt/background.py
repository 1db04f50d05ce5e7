"""The engine ``async``: copies what this rank writes, and lets a thread write it while training goes on.

Note: two sets of ranks that talk
    The thread agrees with the other ranks' threads over a gloo group of its own, so that no collective of training
    meets one of saving. What the main thread agrees on goes over the same group, and only while no thread works: before
    a save begins, and after one has ended. Where a thread cannot be started on one rank, none begins.

Note: who waits for whom
    ``save`` and ``commit`` are called by every rank, and agree. ``close`` is also called by a rank that ends because
    of an error, whose peers may never come: it waits for its own thread alone. That thread's peers are threads that
    were started with it, and a rank that dies takes its connections with it; one that hangs is left after the timeout
    of the engine's group.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ds_ckpt.config import AsyncConfig
from ds_ckpt.sharded import ShardedCheckpoint, written_by
from ds_core.checkpoint.flight import Flight
from ds_core.checkpoint.lost import telling_of_lost_ranks
from ds_core.checkpoint.saving import place_in, together
from ds_core.comm import raise_together
from ds_core.errors import CheckpointError, CommError, DsError
from ds_core.interfaces.checkpoint import CheckpointEngine
from ds_core.interfaces.logical import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    from torch.distributed import ProcessGroup

    from ds_ckpt.host import HostMemory
    from ds_ckpt.loading import StoredReader
    from ds_core.config import Section
    from ds_core.interfaces.checkpoint import Directory

__all__ = ["AsyncCheckpoint"]


class AsyncCheckpoint(CheckpointEngine):
    """Writes what ``sharded`` writes, in the background; one save at a time, the next one waits for it."""

    Config: ClassVar[type[Section] | None] = AsyncConfig
    takes_urls = ShardedCheckpoint.takes_urls
    reads_universal = ShardedCheckpoint.reads_universal

    def __init__(self, options: Section | None, group: ProcessGroup | None) -> None:
        # Here, since `ds config check` asks the class for its options without torch.
        from ds_ckpt.host import HostMemory

        super().__init__(options, group)
        self._config = cast("AsyncConfig", options) if options is not None else AsyncConfig()
        # One for all saves: it knows what is in the checkpoints that it has looked at.
        self._writer = ShardedCheckpoint(self._config, group, section="async")
        self._memory = HostMemory()
        self._own_group: ProcessGroup | None = None
        self._flight: Flight | None = None

    def save(self, directory: Directory, tag: str, snapshot: Snapshot, *, latest: bool) -> None:
        self.commit()
        rank, world_size = place_in(self.group)
        if world_size > 1 and self._own_group is None:
            self._own_group = _group_like(cast("ProcessGroup", self.group))
        self._writer.group = self._own_group
        prepared: list[Flight] = []

        def prepare() -> None:
            captured = _captured(snapshot, rank, self._memory)
            flight = Flight(
                partial(_write, self._writer, directory, tag, captured, latest),
                directory=directory,
                label=f"checkpoint {tag!r} in {directory}",
                total_bytes=sum(piece.data.nbytes for piece in captured.pieces),
                speaks=rank == 0,
            )
            flight.prepare()
            prepared.append(flight)

        place = f"{directory}/{tag}"
        try:
            with telling_of_lost_ranks(place):
                together(prepare, place, self._own_group)
        except BaseException:
            for flight in prepared:
                flight.cancel()
            raise
        self._flight = prepared[0]
        self._flight.begin()

    def open(self, directory: Directory, tag: str) -> StoredReader:
        return self._writer.open(directory, tag)

    def read_latest(self, directory: Directory) -> str:
        return self._writer.read_latest(directory)

    def read_latest_universal(self, directory: Directory) -> str:
        return self._writer.read_latest_universal(directory)

    def commit(self) -> None:
        if self._flight is None:
            return  # on every rank: all of them started it
        failure = self._landed()
        if not _is_there(self._own_group):
            if failure is not None:
                raise failure
            return
        try:
            raise_together(failure, self._own_group)
        except CommError as error:
            raise failure or CheckpointError(
                f"whether the checkpoint is complete is not known: {error.what}",
                fix="start the job again from the last complete checkpoint",
            ) from error

    def close(self) -> None:
        failure = self._landed()
        if self._own_group is not None and _is_there(self._own_group):
            import torch.distributed as dist

            dist.destroy_process_group(self._own_group)
        self._own_group = None
        self._memory.release()
        if failure is not None:
            raise failure

    def _landed(self) -> DsError | None:
        """Wait for the save in flight; return why it failed, which the caller tells."""
        flight = self._flight
        if flight is None:
            return None
        flight.wait()
        self._flight = None
        flight.told()
        return flight.failure


def _captured(snapshot: Snapshot, rank: int, memory: HostMemory) -> Snapshot:
    """Return ``snapshot`` as it is now, whatever becomes of what it was made of."""
    import torch

    mine = written_by(rank, snapshot.pieces)
    copies = dict(zip(map(id, mine), memory.copy(mine), strict=True))
    nothing = torch.empty(0)
    # What others write stays by name: the manifest lists tensors in the order of the model.
    pieces = [copies.get(id(piece)) or replace(piece, data=nothing) for piece in snapshot.pieces]
    return Snapshot(pieces, _copy_of_json(snapshot.state), _copy_of_json(snapshot.rank_state))


def _copy_of_json(value: Any) -> Any:
    return json.loads(json.dumps(dict(value)))


def _write(
    writer: ShardedCheckpoint,
    directory: Directory,
    tag: str,
    snapshot: Snapshot,
    latest: bool,
    count: Callable[[int], None],
) -> None:
    """Do the work of the thread."""
    try:
        writer.on_written = count
        writer.save(directory, tag, snapshot, latest=latest)
    except DsError:
        raise
    except Exception as error:
        if not _is_there(writer.group):
            raise CheckpointError(
                "the process group was destroyed while the checkpoint was being written",
                where=f"{directory}, tag {tag!r}",
                fix="call engine.destroy(), or engine.checkpoint_engine.commit(), before the group is destroyed; "
                "ds_core.comm.destroy_process_group() waits for it",
            ) from error
        raise CheckpointError(
            f"the ranks lost each other while the checkpoint was being written: {error}",
            where=f"{directory}, tag {tag!r}",
            fix="see why a rank ended; what was complete before can still be loaded",
        ) from error


def _group_like(group: ProcessGroup) -> ProcessGroup:
    """Return a gloo group of the same ranks and timeout. Collective.

    Raises:
        CheckpointError: ``group`` is not the whole job.
    """
    import torch.distributed as dist

    some, everyone = dist.get_world_size(group), dist.get_world_size()
    if some < everyone:
        # The others are not here. new_group(use_local_synchronization=True) hangs where its ranks are in different
        # numbers of groups already: it hashes that number into the name they meet under (torch 2.13).
        raise CheckpointError(
            f"saving in the background needs all ranks of the job, this engine has {some} of {everyone}",
            where="checkpoint.engine",
            fix='set checkpoint.engine to "sharded"',
        )
    return cast("ProcessGroup", dist.new_group(timeout=_timeout_of(group), backend="gloo"))


def _timeout_of(group: ProcessGroup) -> timedelta | None:
    """Return the timeout of ``group``; None, which means torch's own, of a backend that does not say."""
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    return cast("timedelta | None", getattr(options, "_timeout", None))


def _is_there(group: ProcessGroup | None) -> bool:
    """Return whether ``group`` can be used: it was not destroyed by somebody; None, one process alone, can."""
    if group is None:
        return True
    import torch.distributed as dist

    try:
        dist.get_backend(group)
    except ValueError:
        return False
    return True
