"""Reads ds-sharded: its manifest says all, and its files are looked at for their sizes only. Loads no torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ds_ckpt.checks import damaged, open_inside, read_inside
from ds_ckpt.manifest import FORMAT, decode
from ds_core.checkpoint.folder import MANIFEST

if TYPE_CHECKING:
    from pathlib import Path

    from ds_ckpt.stored import Stored

__all__ = ["is_sharded", "read_manifest", "read_sharded"]


def read_sharded(folder: Path) -> Stored:
    """Return what the checkpoint in ``folder`` holds.

    Raises:
        CheckpointError: the manifest is damaged or says what cannot be, a file is missing, a link, or of another size.
    """
    return read_manifest(read_inside(folder, MANIFEST), folder)


def is_sharded(data: bytes) -> bool:
    """Return whether a manifest is of this format, be it damaged."""
    return FORMAT.encode() in data[:60] or b'"xxh3:' in data[:100]


def read_manifest(data: bytes, folder: Path) -> Stored:
    """:func:`read_sharded` of a manifest that was read already."""
    stored = decode(data, folder)
    for file in stored.files.values():
        check_size(folder, file.name, file.nbytes)
    return stored


def check_size(folder: Path, name: str, nbytes: int) -> None:
    """Raise if ``name`` is not a regular file of ``nbytes`` inside ``folder``."""
    descriptor = open_inside(folder, name)
    try:
        found = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    if found != nbytes:
        raise damaged(f"a file of the checkpoint has {found} bytes instead of {nbytes}", folder, name)
