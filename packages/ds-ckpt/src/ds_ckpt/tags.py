"""The checkpoints in a folder, of every format: which there are, whether they are whole, and which one is meant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_ckpt import formats
from ds_ckpt.formats.deepspeed import is_deepspeed
from ds_core.checkpoint.folder import LATEST, MANIFEST, check_tag, read_latest
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from ds_ckpt.stored import Stored

__all__ = ["Tag", "find_tags", "folder_of"]

_LATEST_UNIVERSAL = "latest_universal"
_TORN = re.compile(r"rank_\d{5}(_\d+)?-[0-9a-f]{12}\.safetensors(\.tmp)?")


@dataclass(frozen=True)
class Tag:
    """A checkpoint in a folder."""

    name: str
    is_latest: bool
    stored: Stored | None
    """What is in it; None where it cannot be loaded."""
    problem: str | None
    """Why it cannot be loaded."""


def find_tags(directory: Path) -> list[Tag]:
    """Return the checkpoints in ``directory``, oldest first, also those that were torn or damaged.

    Raises:
        CheckpointError: there is no such folder.
    """
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


def folder_of(path: Path, tag: str | None) -> Path:
    """Return the folder of the checkpoint that is meant.

    Args:
        path: where tags are; without ``tag`` also a tag's own folder.
        tag: None: ``path`` itself where it is a checkpoint, else what ``latest`` in it names.

    Raises:
        CheckpointError: it cannot be told; the fix names the tags there are.
    """
    if tag is not None:
        return path / check_tag(tag)
    _check_folder(path)
    if _is_checkpoint(path):
        return path
    named = _named_latest(path)
    if named is not None:
        return path / named
    names = [folder.name for folder in _candidates(path)]
    raise CheckpointError(
        "there is no file 'latest' that names the checkpoint to read",
        where=str(path),
        fix=f"pass a tag, one of {', '.join(names)}" if names else "check the path: no checkpoint is in it",
    )


def _check_folder(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(
            "there is no such folder" if not directory.exists() else "this is no folder",
            where=str(directory),
            fix="pass the folder that checkpoints were saved to",
        )


def _is_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST).exists() or is_deepspeed(folder)


def _candidates(directory: Path) -> list[Path]:
    """Return the folders that are checkpoints or that a save left unfinished, oldest first."""
    found = [
        folder
        for folder in directory.iterdir()
        if folder.is_dir() and (_is_checkpoint(folder) or any(_TORN.fullmatch(path.name) for path in folder.iterdir()))
    ]
    return sorted(found, key=lambda folder: (_age(folder), folder.name))


def _age(folder: Path) -> int:
    manifest = folder / MANIFEST
    return (manifest if manifest.is_file() else folder).stat().st_mtime_ns


def _named_latest(directory: Path) -> str | None:
    """Return the tag that is named as the latest; None where there is no such file."""
    if (directory / LATEST).is_file():
        return read_latest(directory)
    if (directory / _LATEST_UNIVERSAL).is_file():
        return check_tag((directory / _LATEST_UNIVERSAL).read_text().strip())
    return None
