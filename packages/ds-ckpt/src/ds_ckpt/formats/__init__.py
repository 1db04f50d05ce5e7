"""Formats: what turns a folder into a :class:`ds_ckpt.stored.Stored`. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_ckpt.storage import folder_at
from ds_core.checkpoint.folder import MANIFEST
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from os import PathLike

    from ds_ckpt.storage import Folder
    from ds_ckpt.stored import Stored

__all__ = ["is_deepspeed", "read"]


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
    others = folder.parent.complete_tags()
    raise CheckpointError(
        f"checkpoint {folder.name!r} is not complete: it has no {MANIFEST}, and is none of DeepSpeed's"
        if folder.is_there()
        else f"there is no checkpoint {folder.name!r}",
        where=str(folder.parent),
        fix=f"complete checkpoints there: {', '.join(others)}"
        if others
        else "no complete checkpoint is in this folder",
    )


def is_deepspeed(folder: Folder) -> bool:
    """Return whether ``folder``, of a tag, is one that DeepSpeed wrote, by the names of its files."""
    from ds_ckpt.formats import deepspeed

    if folder.path is not None:
        return folder.is_there() and deepspeed.is_deepspeed(folder.path)
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
    name = manifest.get("format") if isinstance(manifest, dict) else manifest
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
