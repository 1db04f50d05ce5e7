"""Turns an engine that was written for DeepSpeed's interface into an entry of the seam ``checkpoint``.

A subclass names the engine, and the package registers it under ``ds_core.checkpoint``::

    class TheirCheckpoint(AdaptedCheckpoint):
        files = TheirEngine

Note: who does what
    The engine stores files, one per rank; it is told to ``commit`` before anything else is written. That a folder is a
    checkpoint is ours: sizes, the table of what is where and the state go into a manifest that is written last, then
    ``latest``, then what no manifest names is removed, as ``plain`` does it. So a crash leaves the previous checkpoint
    or the new one, whatever the engine does. How files are read, and whether that unpickles, is the engine's business.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ds_core.checkpoint.atomic import replace_text, sync_folder
from ds_core.checkpoint.deepspeed_interface import CheckpointCommitInfo
from ds_core.checkpoint.folder import MANIFEST, complete_tags, read_latest, write_latest
from ds_core.checkpoint.lost import telling_of_lost_ranks
from ds_core.checkpoint.pieces import Filling, check_once, describe, from_row
from ds_core.checkpoint.saving import (
    agree_on_id,
    chunk_key,
    file_name,
    gather,
    is_ours,
    place_in,
    remove_leftovers,
    together,
    written_by,
)
from ds_core.errors import CheckpointError
from ds_core.interfaces.checkpoint import CheckpointEngine, CheckpointReader, digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from ds_core.checkpoint.deepspeed_interface import CheckpointEngine as FileEngine
    from ds_core.config import Section
    from ds_core.interfaces.checkpoint import Directory
    from ds_core.interfaces.logical import LogicalTensor, Piece, Snapshot

__all__ = ["AdaptedCheckpoint", "AdaptedReader"]

FORMAT = "ds-adapted"
FORMAT_VERSION = 1


@dataclass
class _Begun:
    """A save whose files were given to the engine."""

    info: CheckpointCommitInfo
    name: str
    """Of this rank's file."""
    snapshot: Snapshot
    """Its state; the pieces are in the file."""
    rows: list[dict[str, Any]]
    files: dict[str, int] = field(default_factory=dict)
    """What there is of this rank once the engine has committed: name -> bytes."""

    @property
    def folder(self) -> Path:
        return Path(self.info.save_dir) / self.info.tag


class AdaptedCheckpoint(CheckpointEngine):
    """Stores one file per rank through an engine of DeepSpeed's interface. Subclass it with ``files``."""

    files: ClassVar[type[FileEngine]]
    """The engine's class. It gets the options ``checkpoint.<name>`` as a dict, or None where ``Config`` is None."""
    completes_at_commit = True

    def __init__(self, options: Section | None, group: ProcessGroup | None) -> None:
        super().__init__(options, group)
        self._files = self.files(None if options is None else options.model_dump())
        self._begun: _Begun | None = None
        self._closed = False

    def save(self, directory: Directory, tag: str, snapshot: Snapshot, *, latest: bool) -> None:
        self.commit()
        with telling_of_lost_ranks(Path(directory) / tag):
            self._save(directory, tag, snapshot, latest)

    def _save(self, directory: Directory, tag: str, snapshot: Snapshot, latest: bool) -> None:
        rank, _ = place_in(self.group)
        name = file_name(rank, agree_on_id(self.group), suffix="pt")
        info = CheckpointCommitInfo(tag, str(directory), latest)
        folder = Path(directory) / tag
        begun: list[_Begun] = []
        try:
            together(lambda: begun.append(self._begin(info, name, rank, snapshot)), folder, self.group)
        except CheckpointError:
            _discard(folder, name)
            raise
        if self._files.is_decoupled():
            self._begun = begun[0]
        else:
            self._finish(begun[0])

    def open(self, directory: Directory, tag: str) -> AdaptedReader:
        return AdaptedReader(self._files, Path(directory), tag)

    def read_latest(self, directory: Directory) -> str:
        return read_latest(Path(directory))

    def commit(self) -> None:
        begun, self._begun = self._begun, None
        if begun is not None:
            with telling_of_lost_ranks(begun.folder):
                self._finish(begun)

    def close(self) -> None:
        """End the engine. A save that was not committed is completed by one process alone, else discarded and told."""
        discarded: _Begun | None = None
        try:
            if place_in(self.group)[1] == 1:
                self.commit()
            else:
                # The manifest needs the other ranks, and they may be elsewhere: this one may end because of an error.
                discarded, self._begun = self._begun, None
        finally:
            if not self._closed and self._files.is_decoupled():
                self._files.cleanup()
            self._closed = True
            if discarded is not None:
                _discard(discarded.folder, discarded.name)
        if discarded is not None:
            raise CheckpointError(
                f"checkpoint {discarded.info.tag!r} was saved but never committed, and is discarded",
                where=str(discarded.folder),
                fix="call engine.checkpoint_engine.commit() on every rank before the engine goes",
            )

    def _begin(self, info: CheckpointCommitInfo, name: str, rank: int, snapshot: Snapshot) -> _Begun:
        state, rank_state = (json.loads(json.dumps(dict(part))) for part in (snapshot.state, snapshot.rank_state))
        mine = {chunk_key(piece.of, piece.chunk): piece for piece in written_by(rank, snapshot.pieces)}
        begun = _Begun(info, name, type(snapshot)([], state, rank_state), [describe(piece) for piece in mine.values()])
        self._files.makedirs(str(begun.folder), exist_ok=True)
        self._files.create(info)
        self._files.save({key: self._given(piece) for key, piece in mine.items()}, str(begun.folder / name))
        if self._files.is_decoupled():
            self._files.set_commit_info(info)
        return begun

    def _given(self, piece: Piece) -> Tensor:
        """Return the data of ``piece`` as the engine may keep it: until its commit, where that comes later."""
        data = piece.data.detach().to(getattr(torch, piece.of.dtype))
        if self._files.is_decoupled():
            return data.to("cpu", copy=True)
        is_view = data.untyped_storage().nbytes() != data.nbytes
        return data.clone() if is_view and self._files.preserves_storage_sharing() else data

    def _finish(self, begun: _Begun) -> None:
        """Make the files a checkpoint. Collective."""
        rank, _ = place_in(self.group)
        folder = begun.folder
        try:
            together(lambda: self._complete(begun), folder, self.group)
        except CheckpointError:
            _discard(folder, begun.name)
            raise
        everyone = gather(begun, self.group)
        together(lambda: self._write_manifest(everyone) if rank == 0 else None, folder, self.group)

    def _complete(self, begun: _Begun) -> None:
        """Have the engine complete this rank's files, and make them durable."""
        engine = type(self._files).__name__
        info = self._files.get_commit_info() if self._files.is_decoupled() else None
        if self._files.commit(info or begun.info) is False:
            raise CheckpointError(
                f"{engine}.commit() returned False: the checkpoint is not complete",
                where=str(begun.folder),
                fix=f"see what {engine} logged; what was complete before can still be loaded",
            )
        for path in sorted(begun.folder.glob(f"{begun.name}*")):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                begun.files[path.name] = os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)
        if not any(begun.files.values()):
            raise CheckpointError(
                f"{engine} has written nothing to the file it was given",
                where=str(begun.folder / begun.name),
                fix="its save() must write to the path, or to names that begin with it, before commit() returns",
            )
        sync_folder(begun.folder)

    def _write_manifest(self, everyone: Sequence[_Begun]) -> None:
        first = everyone[0]
        files = {name: size for begun in everyone for name, size in begun.files.items()}
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "engine": type(self._files).__name__,
            "world_size": len(everyone),
            "files": files,
            "state": first.snapshot.state,
            "ranks": [
                {"file": begun.name, "rank_state": begun.snapshot.rank_state, "tensors": begun.rows}
                for begun in everyone
            ],
        }
        replace_text(first.folder / MANIFEST, json.dumps(manifest))
        sync_folder(first.folder.parent)
        if first.info.save_latest:
            write_latest(first.folder.parent, first.info.tag)
        remove_leftovers(first.folder, keep=files)


def _discard(folder: Path, name: str) -> None:
    """Remove what there is of a file that no manifest will ever name."""
    if folder.is_dir():
        keep = {path.name for path in folder.iterdir() if not path.name.startswith(name)}
        remove_leftovers(folder, keep=keep)


class AdaptedReader(CheckpointReader):
    """Reads what :class:`AdaptedCheckpoint` wrote, through the engine: a file as a whole, one at a time."""

    def __init__(self, files: FileEngine, directory: Path, tag: str) -> None:
        self._files, self._folder = files, directory / tag
        self._others = [other for other in complete_tags(directory) if other != tag]
        self._manifest = self._read_manifest()
        self._stored: dict[tuple[str, str, int | None], LogicalTensor] = {}
        self._rows: dict[str, list[Any]] = {}
        try:
            for name, size in self._manifest["files"].items():
                self._check_file(name, size)
            self._check_ranks()
            for rank in self._manifest["ranks"]:
                rows = self._rows[rank["file"]] = [(row["key"], *from_row(row)) for row in rank["tensors"]]
                for _, of, _ in rows:
                    self._stored.setdefault((of.name, of.kind, of.rank), of)
            check_once((of, chunk) for rows in self._rows.values() for _, of, chunk in rows)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(f"the manifest is damaged: {error!r}", self._folder / MANIFEST) from error

    @property
    def state(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self._manifest["state"]
        return state

    @property
    def world_size(self) -> int:
        return int(self._manifest["world_size"])

    @property
    def identity(self) -> str:
        return digest(self._manifest["files"], self.world_size, self.state)

    def rank_state(self, rank: int) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self._manifest["ranks"][rank]["rank_state"]
        return state

    def tensors(self) -> Sequence[LogicalTensor]:
        return list(self._stored.values())

    def read(self, wanted: Sequence[Piece]) -> None:
        fillings: dict[tuple[str, str, int | None], list[Filling]] = {}
        for piece in wanted:
            key = (piece.of.name, piece.of.kind, piece.of.rank)
            fillings.setdefault(key, []).append(Filling(piece, self._stored.get(key), str(self._folder)))
        for name, rows in self._rows.items():
            needed = [row for row in rows if (row[1].name, row[1].kind, row[1].rank) in fillings]
            if not needed:
                continue
            content = self._load(name, [key for key, *_ in needed])
            for key, of, chunk in needed:
                for filling in fillings[of.name, of.kind, of.rank]:
                    filling.take(chunk, content[key])
        for of_one in fillings.values():
            for filling in of_one:
                filling.end()

    def close(self) -> None:
        self._rows.clear()

    def _load(self, name: str, keys: Sequence[str]) -> Mapping[str, Tensor]:
        path = self._folder / name
        try:
            content: Mapping[str, Tensor] = self._files.load(str(path), map_location="cpu")
            missing = [key for key in keys if not isinstance(content[key], torch.Tensor)]
        except Exception as error:
            # Whatever the engine raises: it is the file that cannot be read.
            what = f"{type(self._files).__name__} cannot read a file of the checkpoint: {type(error).__name__}: {error}"
            raise self._damaged(what, path) from error
        if missing:
            raise self._damaged(f"a file of the checkpoint has no tensor {missing[0]!r}", path)
        return content

    def _check_file(self, name: str, size: int) -> None:
        path = self._folder / name
        if not is_ours(name) or "/" in name:
            raise self._damaged(f"the manifest names {name!r}, which is no file of a checkpoint", path)
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise self._damaged("a file of the checkpoint is missing", path) from None
        if found != size:
            raise self._damaged(f"a file of the checkpoint has {found} bytes instead of {size}", path)

    def _check_ranks(self) -> None:
        """Refuse what the manifest says of ranks where it is not as this engine writes it; files were checked."""
        ranks, files = self._manifest["ranks"], self._manifest["files"]
        manifest = self._folder / MANIFEST
        if type(self._manifest["world_size"]) is not int or len(ranks) != self._manifest["world_size"]:
            raise self._damaged(f"the manifest is damaged: {len(ranks)} ranks, world_size is another number", manifest)
        if not isinstance(self._manifest["state"], dict) or not all(isinstance(r["rank_state"], dict) for r in ranks):
            raise self._damaged("the manifest is damaged: a state is missing", manifest)
        for rank in ranks:
            # The engine may have written to names that begin with the one it was given.
            name = rank["file"]
            is_one = isinstance(name, str) and name.endswith(".pt") and any(file.startswith(name) for file in files)
            if not is_one:
                raise self._damaged(f"the manifest names {str(name)[:200]!r}, which is no file of it", manifest)

    def _damaged(self, what: str, path: Path) -> CheckpointError:
        others = self._others
        fix = f"load another one, such as tag={others[-1]!r}" if others else "restore the file from a copy"
        return CheckpointError(what, where=str(path), fix=fix)

    def _read_manifest(self) -> dict[str, Any]:
        path, tag = self._folder / MANIFEST, self._folder.name
        there = ", ".join(self._others)
        fix = f"complete checkpoints there: {there}" if there else "no complete checkpoint is in this folder"
        try:
            manifest = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            half = self._folder.is_dir()
            what = f"checkpoint {tag!r} is not complete: it has no {MANIFEST}" if half else f"no checkpoint {tag!r}"
            raise CheckpointError(what, where=str(self._folder.parent), fix=fix) from None
        except ValueError as error:
            raise CheckpointError(f"the manifest is damaged: {error}", where=str(path), fix=fix) from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
            raise CheckpointError(
                f"this checkpoint has format {found!r}, not {FORMAT!r}",
                where=str(path),
                fix="set checkpoint.engine to the engine that wrote it",
            )
        if manifest.get("version") != FORMAT_VERSION:
            raise CheckpointError(
                f"this checkpoint has version {manifest.get('version')!r} of its format, known is {FORMAT_VERSION}",
                where=str(path),
                fix="pip install --upgrade ds-core",
            )
        return manifest
