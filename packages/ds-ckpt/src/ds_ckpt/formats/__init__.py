"""Formats: what turns a folder into a :class:`ds_ckpt.stored.Stored`. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_core.checkpoint.folder import MANIFEST, complete_tags
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from ds_ckpt.stored import Stored

__all__ = ["read"]


def read(folder: Path) -> Stored:
    """Return what the checkpoint in ``folder`` holds, whatever wrote it. No tensor is read.

    Args:
        folder: of the tag.

    Raises:
        CheckpointError: there is none, half of one, or one that cannot be believed.
    """
    if (folder / MANIFEST).is_symlink() or (folder / MANIFEST).exists():
        return _read_ours(folder)
    from ds_ckpt.formats import deepspeed

    if folder.is_dir() and deepspeed.is_deepspeed(folder):
        return deepspeed.read_deepspeed(folder)
    others = complete_tags(folder.parent)
    raise CheckpointError(
        f"checkpoint {folder.name!r} is not complete: it has no {MANIFEST}, and is none of DeepSpeed's"
        if folder.is_dir()
        else f"there is no checkpoint {folder.name!r}",
        where=str(folder.parent),
        fix=f"complete checkpoints there: {', '.join(others)}"
        if others
        else "no complete checkpoint is in this folder",
    )


def _read_ours(folder: Path) -> Stored:
    from ds_ckpt.checks import damaged, parse_json, read_inside, short
    from ds_ckpt.formats import plain, sharded

    data = read_inside(folder, MANIFEST)
    if sharded.is_sharded(data):
        return sharded.read_manifest(data, folder)
    manifest = parse_json(data, folder, MANIFEST)
    if plain.is_plain(manifest):
        return plain.read_manifest(manifest, folder)
    name = manifest.get("format") if isinstance(manifest, dict) else manifest
    raise damaged(f"the format {short(name)} of this checkpoint is not known", folder, MANIFEST)
