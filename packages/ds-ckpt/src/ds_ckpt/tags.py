"""The checkpoints in a folder, of every format: which there are, whether they are whole, and which one is meant."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_ckpt import formats
from ds_ckpt.formats import is_deepspeed
from ds_ckpt.storage import folder_at
from ds_core.checkpoint.folder import LATEST, LATEST_UNIVERSAL, MANIFEST, check_tag
from ds_core.errors import CheckpointError
from ds_core.log import log_dist

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from ds_ckpt.formats import Candidate
    from ds_ckpt.storage import Folder
    from ds_ckpt.stored import Stored

__all__ = ["Tag", "find_tags", "folder_of", "latest_problem", "latest_universal", "read_latest"]

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

    Args:
        place: where tags are; a tag's own folder is listed, too.

    Raises:
        CheckpointError: there is no such folder, or it cannot be read.
    """
    directory = folder_at(place)
    _check_folder(directory)
    latest, _ = _latest(directory)
    itself = formats.look_at(directory)
    found = [] if itself is None or itself.problem is not None else [itself]
    return [_tag(each, latest) for each in found + formats.candidates(directory)]


def latest_problem(place: str | PathLike[str] | Folder, tags: Sequence[Tag]) -> str | None:
    """Return why what ``latest`` names cannot be loaded, but for what is wrong with the checkpoint; None: nothing is.

    Args:
        place: where tags are.
        tags: those that were found there.
    """
    latest, problem = _latest(folder_at(place))
    if problem is None and latest is not None and all(tag.name != latest for tag in tags):
        return f"it names {latest!r}, and there is no such checkpoint"
    return problem


def read_latest(place: str | PathLike[str] | Folder) -> str:
    """Return the tag that ``latest`` in a folder names; the error names the tags of every format that are there.

    Raises:
        NoCheckpointError: there is no such folder, or no checkpoint in it.
        CheckpointError: checkpoints are in it, but no such file, or it names no tag.
    """
    directory = folder_at(place)
    try:
        return directory.read_latest()
    except CheckpointError as error:
        kind, fix = type(error), None
        try:
            fix = _fix(directory)
            if any(each.is_complete for each in formats.candidates(directory)):
                kind = CheckpointError
        except CheckpointError:
            kind = CheckpointError  # a folder or store that does not answer
        raise kind(error.what, where=error.where, fix=fix or error.fix) from error.__cause__


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
    raise CheckpointError(
        "there is no file 'latest' that names the checkpoint to read",
        where=str(directory),
        fix=_fix(directory) or "check the path: no checkpoint is in it",
    )


def latest_universal(place: str | PathLike[str] | Folder) -> str:
    """Return the tag that ``checkpoint.load_universal`` means: ``latest_universal``'s, else ``latest``'s.

    Every checkpoint is universal as it is: it loads at any world size, stage and precision. Of one that DeepSpeed wrote
    a warning says that it was not converted.

    Raises:
        NoCheckpointError: there is no such folder, or no checkpoint in it.
        CheckpointError: checkpoints are in it, but no such file.
    """
    directory = folder_at(place)
    if directory.is_there() and directory.has(LATEST_UNIVERSAL):
        return _read_latest_universal(directory)
    try:
        tag = read_latest(directory)
    except CheckpointError as error:
        if not directory.is_there() or directory.has(LATEST):
            raise
        what = "there is no file 'latest_universal' that names the checkpoint to load, and no 'latest'"
        raise type(error)(what, where=error.where, fix=error.fix) from None
    if not (directory / tag).has(MANIFEST):
        log_dist(
            f"checkpoint.load_universal: there is no file 'latest_universal', what 'latest' names is loaded: {tag!r}, "
            "as DeepSpeed wrote it; it needs no conversion",
            level=logging.WARNING,
        )
    return tag


def _check_folder(directory: Folder) -> None:
    if not directory.is_there():
        is_file = directory.path is not None and directory.path.exists()
        raise CheckpointError(
            "this is no folder" if is_file else "there is no such folder",
            where=str(directory),
            fix="pass the folder that checkpoints were saved to",
        )


def _tag(each: Candidate, latest: str | None) -> Tag:
    folder, stored, problem = each.folder, None, each.problem
    if problem is None:
        try:
            stored = formats.read(folder)
        except CheckpointError as error:
            # Of the place what is not known yet: the file.
            place = error.where or ""
            inside = place.removeprefix(f"{folder}/") if place.startswith(f"{folder}/") else ""
            problem = f"{inside}: {error.what}" if inside else error.what
    name = folder.name or str(folder)
    return Tag(name, name == latest, stored, problem)


def _fix(directory: Folder) -> str | None:
    """Return which tags can be given, or what became of the saves there were; None where there is nothing."""
    found = formats.candidates(directory)
    complete = [each.folder.name for each in found if each.is_complete]
    if complete:
        return f"pass tag=, one of {', '.join(complete)}"
    torn = [each.folder.name for each in found if each.problem is None]
    return formats.unfinished(torn[-1]) if torn else None


def _latest(directory: Folder) -> tuple[str | None, str | None]:
    """Return the tag that is named as the latest, where there is such a file; and what is wrong with the file."""
    if LATEST in directory.folders():
        return None, "it is a folder, where a file that names a tag should be"
    try:
        return _named_latest(directory), None
    except CheckpointError as error:
        return None, error.what


def _named_latest(directory: Folder) -> str | None:
    """Return the tag that is named as the latest; None where there is no such file."""
    if directory.has(LATEST):
        return read_latest(directory)
    return _read_latest_universal(directory) if directory.has(LATEST_UNIVERSAL) else None


def _read_latest_universal(directory: Folder) -> str:
    return check_tag(directory.read(LATEST_UNIVERSAL, _MAX_TAG_BYTES).decode(errors="replace").strip())
