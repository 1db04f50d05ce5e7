"""Formats: what turns a folder into a :class:`ds_ckpt.stored.Stored`. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_ckpt.storage import folder_at
from ds_core.checkpoint.folder import MANIFEST
from ds_core.checkpoint.saving import is_ours
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from os import PathLike

    from ds_ckpt.storage import Folder
    from ds_ckpt.stored import Stored

__all__ = ["Candidate", "candidates", "is_deepspeed", "look_at", "read", "unfinished"]


@dataclass(frozen=True)
class Candidate:
    """A folder that is a checkpoint, or was to be one."""

    folder: Folder
    is_complete: bool
    """Whether it has what makes it a checkpoint: a manifest, or files of DeepSpeed's. It may be damaged."""
    problem: str | None = None
    """Why that cannot be told."""


def read(place: str | PathLike[str] | Folder) -> Stored:
    """Return what the checkpoint in a folder holds, whatever wrote it. No tensor is read.

    Args:
        place: of the tag.

    Raises:
        CheckpointError: there is none, half of one, or one that cannot be believed.
    """
    folder = folder_at(place)
    try:
        if folder.has(MANIFEST):
            return _read_ours(folder)
        if is_deepspeed(folder):
            return _read_deepspeed(folder)
    except MemoryError:
        # What a manifest or pickle makes us hold is bounded by its size, which may be more than there is.
        raise CheckpointError(
            "what the checkpoint holds does not fit into memory",
            where=str(folder),
            fix="read it on a machine with more memory; if it is not a large model's, do not trust it",
        ) from None
    raise _not_there(folder)


def candidates(directory: Folder) -> list[Candidate]:
    """Return the folders in ``directory`` that are checkpoints or that a save left unfinished, oldest first."""
    found = [each for name in directory.folders() if (each := look_at(directory / name)) is not None]
    return sorted(found, key=lambda each: (_changed_ns(each), each.folder.name))


def look_at(folder: Folder) -> Candidate | None:
    """Return what ``folder``, of a tag, is by the names of its files; None where it has nothing of a checkpoint."""
    try:
        files = folder.files()
        if MANIFEST in files or is_deepspeed(folder):
            return Candidate(folder, is_complete=True)
        return Candidate(folder, is_complete=False) if any(map(is_ours, files)) else None
    except CheckpointError as error:
        return Candidate(folder, is_complete=False, problem=error.what)


def unfinished(tag: str) -> str:
    """Return what to do about a folder that a save did not finish."""
    return f"the save of {tag!r} did not end: save again, or remove that folder"


def is_deepspeed(folder: Folder) -> bool:
    """Return whether ``folder``, of a tag, is one that DeepSpeed wrote, by the names of its files."""
    from ds_ckpt.formats import deepspeed

    if folder.path is not None:
        try:
            return folder.is_there() and deepspeed.is_deepspeed(folder.path)
        except PermissionError:
            return False
    return any(name.endswith("_states.pt") for name in folder.files()) or (folder / "zero").has("optimizer_state.pt")


def _read_ours(folder: Folder) -> Stored:
    from ds_ckpt.checks import MAX_JSON_BYTES, damaged, parse_json, short
    from ds_ckpt.formats import plain, sharded

    data = folder.read(MANIFEST, MAX_JSON_BYTES)
    if sharded.is_sharded(data):
        return sharded.read_manifest(data, folder)
    manifest = parse_json(data, folder, MANIFEST)
    if plain.is_plain(manifest):
        return plain.read_manifest(manifest, folder)
    name = manifest.get("format") if isinstance(manifest, dict) else None
    if name is None:
        raise damaged(f"this folder has a {MANIFEST} that is not a checkpoint's", folder, MANIFEST)
    raise damaged(f"the format {short(name)} of this checkpoint is not known", folder, MANIFEST)


def _read_deepspeed(folder: Folder) -> Stored:
    from ds_ckpt.formats import deepspeed

    if folder.path is None:
        # Its files are archives, read in small pieces all over.
        raise CheckpointError(
            "a checkpoint that DeepSpeed wrote is only read from a local disk",
            where=str(folder),
            fix="copy the folder to a local disk and load it from there",
        )
    return deepspeed.read_deepspeed(folder.path)


def _not_there(folder: Folder) -> CheckpointError:
    """Return the error that ``folder``, of a tag, is no checkpoint."""
    here, above = look_at(folder), folder.parent
    if here is not None and here.problem is not None:
        return CheckpointError(here.problem, where=str(folder), fix="check who may read the folder")
    what = f"there is no checkpoint {folder.name!r}"
    if folder.is_there():
        why = "the save of it did not end" if here is not None else "is none of DeepSpeed's"
        what = f"checkpoint {folder.name!r} is not complete: it has no {MANIFEST}, and {why}"
    complete = [each.folder.name for each in candidates(above) if each.is_complete]
    itself = look_at(above)
    if complete:
        fix = f"complete checkpoints there: {', '.join(complete)}"
    elif itself is not None and itself.is_complete:
        fix = "this folder is itself a checkpoint: pass no tag, or the folder that it is in"
    else:
        fix = unfinished(folder.name) if here is not None else "no complete checkpoint is in this folder"
    return CheckpointError(what, where=str(above), fix=fix)


def _changed_ns(each: Candidate) -> int:
    try:
        has_manifest = each.is_complete and each.folder.has(MANIFEST)
        return each.folder.changed_ns(MANIFEST if has_manifest else None) or 0
    except CheckpointError:
        return 0  # it goes first, and what is wrong with it is told when it is read
