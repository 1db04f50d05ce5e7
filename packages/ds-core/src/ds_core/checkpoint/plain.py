"""The built-in checkpoint engine: one safetensors file per rank, and a manifest that makes them a checkpoint.

Note: commit. ``directory/tag/`` gets ``rank_00000-<id>.safetensors`` from each rank, with an id of this save in the
name; when all are synced, rank 0 replaces ``checkpoint.json`` in one rename. A crash before it leaves the checkpoint
that was there, files of the torn save are never read and are removed by the next save under the tag. ``latest`` is
written after that.

The files carry sizes, not checksums: a truncated file is refused, a flipped byte is ds-ckpt's business.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_core import registry
from ds_core.checkpoint.atomic import make_durable, replace_text, sync_folder
from ds_core.checkpoint.files import write_safetensors
from ds_core.checkpoint.folder import (
    MANIFEST,
    PLAIN_FORMAT,
    PLAIN_VERSION,
    complete_tags,
    is_deepspeed,
    read_latest,
    write_latest,
)
from ds_core.checkpoint.lost import telling_of_lost_ranks
from ds_core.checkpoint.pieces import Filling, check_once, describe, from_row
from ds_core.checkpoint.saving import (
    agree_on_id,
    file_name,
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

    from ds_core.interfaces.checkpoint import Directory
    from ds_core.interfaces.logical import Chunk, LogicalTensor, Piece, Snapshot

__all__ = ["PlainCheckpoint", "PlainReader"]


class PlainCheckpoint(CheckpointEngine):
    """Writes files first and the manifest last, so a torn checkpoint is never visible. Nothing is pickled."""

    def save(self, directory: Directory, tag: str, snapshot: Snapshot, *, latest: bool) -> None:
        with telling_of_lost_ranks(Path(directory) / tag):
            self._save(Path(directory), tag, snapshot, latest)

    def _save(self, directory: Path, tag: str, snapshot: Snapshot, latest: bool) -> None:
        rank, world_size = place_in(self.group)
        folder = directory / tag
        save_id = agree_on_id(self.group)
        together(lambda: self._write_own(folder, file_name(rank, save_id), rank, snapshot), folder, self.group)
        together(
            lambda: self._commit(directory, tag, save_id, world_size, snapshot, latest) if rank == 0 else None,
            folder,
            self.group,
        )

    def open(self, directory: Directory, tag: str) -> PlainReader:
        return PlainReader(Path(directory), tag)

    def read_latest(self, directory: Directory) -> str:
        return read_latest(Path(directory))

    def _write_own(self, folder: Path, name: str, rank: int, snapshot: Snapshot) -> None:
        make_durable(folder)
        # Wide dtypes first: then every tensor starts at a multiple of its item size.
        mine = sorted(written_by(rank, snapshot.pieces), key=lambda piece: -piece.data.element_size())
        table = [describe(piece) for piece in mine]
        write_safetensors(
            folder / name,
            [(row["key"], piece.data) for row, piece in zip(table, mine, strict=True)],
            {"pieces": json.dumps(table), "rank_state": json.dumps(dict(snapshot.rank_state))},
        )

    def _commit(
        self, directory: Path, tag: str, save_id: str, world_size: int, snapshot: Snapshot, latest: bool
    ) -> None:
        folder = directory / tag
        names = [file_name(rank, save_id) for rank in range(world_size)]
        manifest = {
            "format": PLAIN_FORMAT,
            "version": PLAIN_VERSION,
            "world_size": world_size,
            "files": {name: (folder / name).stat().st_size for name in names},
            "state": dict(snapshot.state),
        }
        replace_text(folder / MANIFEST, json.dumps(manifest, indent=1))
        sync_folder(directory)
        if latest:
            write_latest(directory, tag)
        remove_leftovers(folder, keep=names)


class PlainReader(CheckpointReader):
    """Reads what :class:`PlainCheckpoint` wrote. Files are mapped: only the parts asked for are read."""

    def __init__(self, directory: Path, tag: str) -> None:
        self._folder = directory / tag
        self._manifest = _read_manifest(directory, tag)
        self._stored: dict[tuple[str, str, int | None], tuple[LogicalTensor, list[tuple[Chunk, Tensor]]]] = {}
        self._rank_states: list[Mapping[str, Any]] = []
        for name, size in self._manifest["files"].items():
            self._open_file(self._folder / name, size)
        try:
            check_once((of, chunk) for of, chunks in self._stored.values() for chunk, _ in chunks)
        except ValueError as error:
            raise self._damaged(f"its files do not make a checkpoint: {error}", self._folder) from None

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
        return self._rank_states[rank]

    def tensors(self) -> Sequence[LogicalTensor]:
        return [of for of, _ in self._stored.values()]

    def read(self, wanted: Sequence[Piece]) -> None:
        for piece in wanted:
            of, chunks = self._stored.get((piece.of.name, piece.of.kind, piece.of.rank), (None, []))
            filling = Filling(piece, of, str(self._folder))
            for chunk, data in chunks:
                filling.take(chunk, data)
            filling.end()

    def close(self) -> None:
        self._stored.clear()

    def _open_file(self, path: Path, size: int) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            status = path.lstat()
        except FileNotFoundError:
            raise self._damaged("a file of the checkpoint is missing", path) from None
        if not stat.S_ISREG(status.st_mode):
            raise self._damaged("a file of the checkpoint is a link, which may lead anywhere, or no file", path)
        if status.st_size != size:
            raise self._damaged(f"a file of the checkpoint has {status.st_size} bytes instead of {size}", path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                self._rank_states.append(json.loads(metadata["rank_state"]))
                for row in json.loads(metadata["pieces"]):
                    of, chunk = from_row(row)
                    known, chunks = self._stored.setdefault((of.name, of.kind, of.rank), (of, []))
                    data = file.get_tensor(row["key"])
                    if known != of or data.numel() != chunk.length:
                        raise ValueError(f"{of.kind} {of.name!r} is not what another row or the file says of it")
                    chunks.append((chunk, data))
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise self._damaged(f"a file of the checkpoint cannot be read: {error}", path) from error

    def _damaged(self, what: str, path: Path) -> CheckpointError:
        others = [tag for tag in complete_tags(self._folder.parent) if tag != self._folder.name]
        fix = f"load another one, such as tag={others[-1]!r}" if others else "restore the file from a copy"
        return CheckpointError(what, where=str(path), fix=fix)


def _read_manifest(directory: Path, tag: str) -> dict[str, Any]:
    path = directory / tag / MANIFEST
    others = [other for other in complete_tags(directory) if other != tag]
    fix = f"complete checkpoints there: {', '.join(others)}" if others else "no complete checkpoint is in this folder"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        half = path.parent.is_dir()
        if half and is_deepspeed(path.parent):
            raise _of_another_engine("this checkpoint was written by DeepSpeed", path.parent) from None
        what = (
            f"checkpoint {tag!r} is not complete: it has no {MANIFEST}" if half else f"there is no checkpoint {tag!r}"
        )
        raise CheckpointError(what, where=str(directory), fix=fix) from None
    except OSError as error:
        raise CheckpointError(
            f"the manifest cannot be read: {error.strerror}", where=str(path), fix="check its permissions and the disk"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the manifest is damaged: {error}", where=str(path), fix=fix) from error
    if not isinstance(manifest, dict) or manifest.get("format") != PLAIN_FORMAT:
        if isinstance(manifest, dict) and manifest.get("format") == "ds-sharded":
            raise _of_another_engine("this checkpoint has format 'ds-sharded'", path)
        raise CheckpointError(
            f"this checkpoint was not written by the engine 'plain' but by {str(manifest)[:40]!r}"
            if not isinstance(manifest, dict)
            else f"this checkpoint has format {manifest.get('format')!r}, not {PLAIN_FORMAT!r}",
            where=str(path),
            fix="set checkpoint.engine to the engine that wrote it",
        )
    version = manifest.get("version")
    if type(version) is int and version > PLAIN_VERSION:
        raise CheckpointError(
            f"this checkpoint has version {version} of its format, known is {PLAIN_VERSION}",
            where=str(path),
            fix="pip install --upgrade ds-core",
        )
    wrong = _wrong_in(manifest)
    if wrong:
        raise CheckpointError(f"the manifest is damaged: {wrong}", where=str(path), fix=fix)
    return manifest


def _wrong_in(manifest: Mapping[str, Any]) -> str | None:
    """Return what is not as this engine writes it, None where everything is."""
    files, world_size = manifest.get("files"), manifest.get("world_size")
    if manifest.get("version") != PLAIN_VERSION or type(world_size) is not int:
        return "its version or world_size is no whole number"
    if not isinstance(manifest.get("state"), dict):
        return "it has no state"
    if not isinstance(files, dict) or len(files) != world_size or not files:
        return f"it does not name a file of each of {world_size} ranks"
    strange = [name for name, size in files.items() if not is_ours(name) or type(size) is not int]
    return f"it names {strange[0][:80]!r}, which is no file of a checkpoint" if strange else None


def _of_another_engine(what: str, where: Path) -> CheckpointError:
    is_here = "sharded" in registry.names("checkpoint")
    return CheckpointError(
        f"{what}, which the engine 'plain' does not read; 'sharded' of ds-ckpt does",
        where=str(where),
        fix='set checkpoint.engine to "sharded", or leave it out' if is_here else "pip install ds-ckpt",
    )
