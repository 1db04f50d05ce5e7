"""Reads ds-sharded: its manifest says all, and its files are looked at for their sizes only. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_ckpt.checks import damaged
from ds_ckpt.manifest import FORMAT, decode

if TYPE_CHECKING:
    from ds_ckpt.storage import Folder
    from ds_ckpt.stored import Stored

__all__ = ["is_sharded", "read_manifest"]


def is_sharded(data: bytes) -> bool:
    """Return whether a manifest is of this format, be it damaged."""
    return FORMAT.encode() in data[:60] or b'"xxh3:' in data[:100]


def read_manifest(data: bytes, folder: Folder) -> Stored:
    """Return what the checkpoint in ``folder`` with the manifest ``data`` holds.

    Raises:
        CheckpointError: the manifest is damaged or says what cannot be, a file is missing, a link, or of another size.
    """
    stored = decode(data, folder)
    sizes = folder.sizes(list(stored.files))
    for name, file in stored.files.items():
        if sizes[name] != file.nbytes:
            raise damaged(f"a file of the checkpoint has {sizes[name]} bytes instead of {file.nbytes}", folder, name)
    return stored
