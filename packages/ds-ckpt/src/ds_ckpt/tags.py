"""The checkpoints in a folder, of every format: which there are, whether they are whole, and which one is meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_ckpt import formats
from ds_ckpt.formats import is_deepspeed
from ds_ckpt.storage import folder_at
from ds_core.checkpoint.folder import LATEST, MANIFEST, check_tag
from ds_core.checkpoint.saving import is_ours
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from os import PathLike

    from ds_ckpt.storage import Folder
    from ds_ckpt.stored import Stored

__all__ = ["Tag", "find_tags", "folder_of", "latest_universal"]

_LATEST_UNIVERSAL = "latest_universal"
_MAX_TAG_BYTES = 4096


@dataclass(frozen=True)
class Tag:
    """A checkpoint in a folder."""

    name: str
    is_latest: bool
    stored: Stored | None
    """What is in it; None where it cannot be loaded."""
    problem: str | None
    """Why it cannot be loaded."""


def find_tags(place: str | PathLike[str] | Folder) -> list[Tag]:
    """Return the checkpoints in a folder, oldest first, also those that were torn or damaged.

    Raises:
        CheckpointError: there is no such folder.
    """
    directory = folder_at(place)
    _check_folder(directory)
    latest = _named_latest(directory)
    found = []
    for folder in _candidates(directory):
        stored, problem = None, None
        try:
            stored = formats.read(folder)
        except CheckpointError as error:
            problem = error.what
        found.append(Tag(folder.name, folder.name == latest, stored, problem))
    return found


def folder_of(place: str | PathLike[str] | Folder, tag: str | None) -> Folder:
    """Return the folder of the checkpoint that is meant.

    Args:
        place: where tags are; without ``tag`` also a tag's own folder.
        tag: None: ``place`` itself where it is a checkpoint, else what ``latest`` in it names.

    Raises:
        CheckpointError: it cannot be told; the fix names the tags there are.
    """
    directory = folder_at(place)
    if tag is not None:
        return directory / check_tag(tag)
    _check_folder(directory)
    if directory.has(MANIFEST) or is_deepspeed(directory):
        return directory
    named = _named_latest(directory)
    if named is not None:
        return directory / named
    names = [folder.name for folder in _candidates(directory)]
    raise CheckpointError(
        "there is no file 'latest' that names the checkpoint to read",
        where=str(directory),
        fix=f"pass a tag, one of {', '.join(names)}" if names else "check the path: no checkpoint is in it",
    )


def latest_universal(place: str | PathLike[str] | Folder) -> str:
    """Return the tag that ``checkpoint.load_universal`` means: ``latest_universal``'s, else ``latest``'s if it is ours.

    Ours are universal as they are: they load at any world size, stage and precision.

    Raises:
        CheckpointError: there is no such folder; or no such file, and what ``latest`` names was written by DeepSpeed.
    """
    directory = folder_at(place)
    _check_folder(directory)
    if directory.has(_LATEST_UNIVERSAL):
        return _read_latest_universal(directory)
    what, fix = "there is no file 'latest_universal' that names the checkpoint to load", "check the path"
    if directory.has(LATEST):
        tag = directory.read_latest()
        if (directory / tag).has(MANIFEST):
            return tag
        what += f"; 'latest' names {tag!r}, which was not made by DeepSpeed's ds_to_universal"
        fix = "set checkpoint.load_universal to false: it loads at any world size without being converted"
    raise CheckpointError(what, where=str(directory), fix=fix)


def _check_folder(directory: Folder) -> None:
    if not directory.is_there():
        is_file = directory.path is not None and directory.path.exists()
        raise CheckpointError(
            "this is no folder" if is_file else "there is no such folder",
            where=str(directory),
            fix="pass the folder that checkpoints were saved to",
        )


def _candidates(directory: Folder) -> list[Folder]:
    """Return the folders that are checkpoints or that a save left unfinished, oldest first."""
    found = []
    for name in directory.folders():
        folder = directory / name
        files = folder.files()
        if MANIFEST in files or is_deepspeed(folder) or any(map(is_ours, files)):
            changed_ns = folder.changed_ns(MANIFEST if MANIFEST in files else None)
            found.append((changed_ns or 0, name, folder))
    return [folder for _, _, folder in sorted(found, key=lambda item: item[:2])]


def _named_latest(directory: Folder) -> str | None:
    """Return the tag that is named as the latest; None where there is no such file."""
    if directory.has(LATEST):
        return directory.read_latest()
    return _read_latest_universal(directory) if directory.has(_LATEST_UNIVERSAL) else None


def _read_latest_universal(directory: Folder) -> str:
    return check_tag(directory.read(_LATEST_UNIVERSAL, _MAX_TAG_BYTES).decode(errors="replace").strip())
