"""The engine ``sharded``: every rank writes its chunks into files of its own, a manifest makes them a checkpoint.

Note: commit. Files carry the id of their save, so nothing that a manifest names is ever written over. All ranks write
and sync; they agree that all could; rank 0 writes the manifest beside, syncs it and renames it into place, then
``latest``, then removes what no manifest names any more. Until the rename the previous checkpoint is what there is.
In a store the manifest is put in place of a rename; see :mod:`ds_ckpt.storage.remote`.
"""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ds_ckpt import formats
from ds_ckpt.checks import ITEM_BYTES, MAX_JSON_BYTES, check_chunks
from ds_ckpt.config import ShardedConfig
from ds_ckpt.keeping import Keeper
from ds_ckpt.layout import share_out
from ds_ckpt.loading import StoredReader
from ds_ckpt.manifest import FORMAT, FORMAT_VERSION, decode, encode
from ds_ckpt.storage import folder_at
from ds_ckpt.stored import Stored, StoredChunk, StoredFile, StoredTensor
from ds_ckpt.tags import latest_universal, read_latest
from ds_core.checkpoint import saving
from ds_core.checkpoint.folder import LATEST, MANIFEST
from ds_core.checkpoint.lost import telling_of_lost_ranks
from ds_core.checkpoint.saving import agree_on_id, file_name, is_ours, place_in, together, warn_of_deepspeed
from ds_core.errors import CheckpointError
from ds_core.interfaces.checkpoint import CheckpointEngine
from ds_core.log import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch.distributed import ProcessGroup

    from ds_ckpt.layout import Part
    from ds_ckpt.storage import Folder
    from ds_ckpt.stored import Key
    from ds_core.config import Section
    from ds_core.interfaces.checkpoint import Directory
    from ds_core.interfaces.logical import LogicalTensor, Piece, Snapshot

__all__ = ["ShardedCheckpoint", "written_by"]


@dataclass
class _Report:
    """What one rank wrote."""

    files: list[StoredFile]
    chunks: list[tuple[LogicalTensor, StoredChunk]]
    rank_state: Mapping[str, Any]


class ShardedCheckpoint(CheckpointEngine):
    """Writes ds-sharded: checksummed, balanced over ranks and threads, nothing pickled. Opens every format."""

    Config: ClassVar[type[Section] | None] = ShardedConfig
    takes_urls: ClassVar[bool] = True
    reads_universal = True

    def __init__(
        self,
        options: Section | None,
        group: ProcessGroup | None,
        *,
        on_written: Callable[[int], object] = lambda nbytes: None,
        section: str = "sharded",
    ) -> None:
        """Make one that writes for another engine, too.

        Args:
            options: None: the defaults.
            group: None: one process alone.
            on_written: told of every number of bytes that was written, in whatever thread.
            section: of ``checkpoint``, that the options are from; for errors.
        """
        super().__init__(options, group)
        self._section = section
        self.on_written = on_written
        self._config = cast("ShardedConfig", options) if options is not None else ShardedConfig()
        self._keeper = Keeper(keep_last=self._config.keep_last, keep_every=self._config.keep_every)

    def save(self, directory: Directory, tag: str, snapshot: Snapshot, *, latest: bool) -> None:
        with telling_of_lost_ranks(_printed(directory, tag)):
            self._save(directory, tag, snapshot, latest)

    def _save(self, directory: Directory, tag: str, snapshot: Snapshot, latest: bool) -> None:
        rank, _ = place_in(self.group)
        save_id = agree_on_id(self.group)
        names = [file_name(rank, save_id, part) for part in range(self._config.writers)]
        places: list[Folder] = []
        mine: list[_Report] = []

        def write() -> None:
            # A store may be out of reach of one rank: its package is missing there.
            places.append(folder_at(directory))
            mine.append(self._write_own(places[0] / tag, names, rank, snapshot))

        try:
            together(write, _printed(directory, tag), self.group)
        except CheckpointError:
            # No manifest will ever name them, and the disk may be full.
            for place in places:
                _remove(place / tag, names, logging.DEBUG)
            raise
        place, folder = places[0], places[0] / tag
        reports = saving.gather(mine[0], self.group)
        together(lambda: self._commit(place, tag, reports, snapshot, latest) if rank == 0 else None, folder, self.group)

    def open(self, directory: Directory, tag: str) -> StoredReader:
        return StoredReader(formats.read(folder_at(directory) / tag))

    def read_latest(self, directory: Directory) -> str:
        return read_latest(directory)

    def read_latest_universal(self, directory: Directory) -> str:
        return latest_universal(directory)

    def _write_own(self, folder: Folder, names: Sequence[str], rank: int, snapshot: Snapshot) -> _Report:
        json.dumps(dict(snapshot.rank_state))  # what cannot be stored is refused before anything is written
        folder.make()
        shares = share_out(written_by(rank, snapshot.pieces), writers=len(names), chunk_bytes=self._config.chunk_bytes)
        report = _Report([], [], snapshot.rank_state)
        for parts, (file, chunks) in zip(shares, _write_files(folder, names, shares, self.on_written), strict=True):
            report.files.append(file)
            report.chunks += [(part.piece.of, chunk) for part, chunk in zip(parts, chunks, strict=True)]
        if shares:
            folder.sync()
        return report

    def _commit(
        self, directory: Folder, tag: str, reports: Sequence[_Report], snapshot: Snapshot, latest: bool
    ) -> None:
        folder = directory / tag
        files = {file.name for report in reports for file in report.files}
        try:
            self._write_manifest(folder, reports, snapshot)
        except BaseException:
            if not _is_named(folder, files):
                # No manifest will ever name them, and the disk may be full.
                _remove(folder, sorted(files), logging.DEBUG)
            raise
        directory.sync()
        if latest:
            directory.replace(LATEST, tag.encode())
        _remove_leftovers(folder, keep=files)
        self._keeper.tidy(directory, tag)

    def _write_manifest(self, folder: Folder, reports: Sequence[_Report], snapshot: Snapshot) -> None:
        data = encode(_joined(folder, reports, snapshot))
        if len(data) > MAX_JSON_BYTES:
            states = [dict(snapshot.state), *(dict(report.rank_state) for report in reports)]
            state_bytes = len(json.dumps(states))
            is_state = 2 * state_bytes > len(data)
            raise CheckpointError(
                f"the manifest would have {len(data)} bytes, {state_bytes} of them the state; readers take "
                f"{MAX_JSON_BYTES}",
                where=str(folder),
                fix="save large values of client_state in a file of your own, with engine.checkpoint_engine.save"
                if is_state
                else f"set checkpoint.{self._section}.chunk_bytes to a larger number",
            )
        try:
            decode(data, folder)
        except CheckpointError as error:
            raise CheckpointError(
                f"what was saved could not be loaded: {error.what}", where=str(folder), fix="shorten what is too long"
            ) from error
        folder.replace(MANIFEST, data)


def written_by(rank: int, pieces: Sequence[Piece]) -> list[Piece]:
    """Return what ``rank`` writes, each chunk once; what no rank could write is refused on all."""
    for piece in pieces:
        if piece.of.dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"dtype {piece.of.dtype} cannot be stored in a safetensors file",
                where=f"tensor {piece.of.kind} {piece.of.name!r}",
                fix=f"one of {', '.join(ITEM_BYTES)}",
            )
    return saving.written_by(rank, pieces)


def _printed(directory: Directory, tag: str) -> str:
    """Return a place for errors, without what a URL has beside it."""
    return f"{str(directory).partition('?')[0].rstrip('/')}/{tag}"


def _write_files(
    folder: Folder, names: Sequence[str], shares: Sequence[Sequence[Part]], on_written: Callable[[int], object]
) -> list[tuple[StoredFile, list[StoredChunk]]]:
    """Write the files of this rank at the same time; the first one's error is raised when all have ended."""
    from ds_ckpt.writing import write_file

    found: dict[int, tuple[StoredFile, list[StoredChunk]]] = {}
    failures: dict[int, BaseException] = {}

    def write(index: int) -> None:
        try:
            found[index] = write_file(folder, names[index], shares[index], on_written)
        except BaseException as error:  # raised below, by the thread that asked for it
            failures[index] = error

    # No executor: those refuse work once the interpreter ends, which is when a save in the background may still run.
    others = [threading.Thread(target=write, args=(index,), name=f"ds-ckpt-{index}") for index in range(1, len(shares))]
    started: list[threading.Thread] = []
    try:
        for thread in others:
            thread.start()
            started.append(thread)
        if shares:
            write(0)
    finally:
        for thread in started:
            thread.join()
    if failures:
        raise failures[min(failures)]
    return [found[index] for index in range(len(shares))]


def _joined(folder: Folder, reports: Sequence[_Report], snapshot: Snapshot) -> Stored:
    """Return what all ranks wrote as one checkpoint, checked as a reader checks it."""
    files = {file.name: file for report in reports for file in report.files}
    found: dict[Key, tuple[LogicalTensor, list[StoredChunk]]] = {}
    for report in reports:
        for of, chunk in report.chunks:
            known, chunks = found.setdefault((of.name, of.kind, of.rank), (of, []))
            if known != of:
                raise CheckpointError(
                    f"ranks differ in {of.kind} {of.name!r}: {list(known.shape)} of {known.dtype}, and "
                    f"{list(of.shape)} of {of.dtype}",
                    where=str(folder),
                    fix="build the same model on every rank",
                )
            chunks.append(chunk)
    # In the order of the model, as rank 0 sees it; what it has no part of comes last.
    order = [(piece.of.name, piece.of.kind, piece.of.rank) for piece in snapshot.pieces]
    tensors = {
        key: StoredTensor(of, tuple(sorted(chunks, key=lambda chunk: (chunk.chunk.box.start, chunk.chunk.offset))))
        for key, (of, chunks) in ((key, found[key]) for key in dict.fromkeys([*order, *found]) if key in found)
    }
    try:
        check_chunks(tensors.values(), {name: file.nbytes for name, file in files.items()}, folder, None)
    except CheckpointError as error:
        raise CheckpointError(
            f"what the ranks gave does not make a checkpoint: {error.what}",
            where=str(folder),
            fix="report it to the authors of the partition: its pieces must hold every element once",
        ) from error
    rank_states = tuple(report.rank_state for report in reports)
    return Stored(folder, FORMAT, str(FORMAT_VERSION), len(reports), tensors, files, snapshot.state, rank_states)


def _remove_leftovers(folder: Folder, keep: Collection[str]) -> None:
    """Remove what earlier saves under a tag left, and nothing of anybody else's; the new save is complete by now."""
    try:
        names = folder.files()
    except CheckpointError as error:
        logger.warning("files of earlier saves cannot be looked for: %s: %s", folder, error.what)
        return
    warn_of_deepspeed(folder, names)
    _remove(folder, [name for name in names if is_ours(name) and name not in keep])


def _is_named(folder: Folder, files: Collection[str]) -> bool:
    """Return whether the manifest of ``folder`` may name one of ``files``: something may fail after it was replaced."""
    try:
        if not folder.has(MANIFEST):
            return False
        data = folder.read(MANIFEST, MAX_JSON_BYTES)
    except (CheckpointError, OSError):
        return True
    return any(name.encode() in data for name in files)


def _remove(folder: Folder, names: Sequence[str], level: int = logging.WARNING) -> None:
    """Remove files that no manifest names; one that stays is told at ``level``, and does no harm."""
    for name in names:
        try:
            folder.remove(name)
        except (CheckpointError, OSError) as error:
            why = error.what if isinstance(error, CheckpointError) else error.strerror
            logger.log(level, "a file of an earlier save cannot be removed: %s/%s: %s", folder, name, why)
