"""The folder users see: ``directory/<tag>/`` for each checkpoint, and ``directory/latest`` naming one of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ds_core.checkpoint.atomic import replace_text
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["LATEST", "MANIFEST", "check_tag", "complete_tags", "is_url", "read_latest", "write_latest"]

LATEST = "latest"
MANIFEST = "checkpoint.json"
"""Its presence makes a folder a checkpoint: it is written last."""


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")


def is_url(directory: object) -> bool:
    """Return whether a directory is a URL; a path object never is, it has lost one of the slashes.

    >>> is_url("s3://bucket/run"), is_url("runs/first"), is_url("/data/a://b")
    (True, False, False)
    """
    return isinstance(directory, str) and _URL.match(directory) is not None


def check_tag(tag: object) -> str:
    """Return ``tag`` as text that names one folder.

    Raises:
        CheckpointError: it is empty, ``latest`` (or its form while it is written), or leads elsewhere.
    """
    text = str(tag)
    reserved = ("", ".", "..", LATEST, f"{LATEST}.tmp")
    if text in reserved or "/" in text or "\\" in text or "\0" in text:
        raise CheckpointError(
            f"tag {text!r} cannot name a checkpoint", where="tag", fix="use a plain folder name, such as 'step_100'"
        )
    return text


def complete_tags(directory: Path) -> list[str]:
    """Return the tags in ``directory`` that are complete, newest last."""
    if not directory.is_dir():
        return []
    manifests = [manifest for manifest in directory.glob(f"*/{MANIFEST}") if manifest.is_file()]
    return [
        path.parent.name for path in sorted(manifests, key=lambda path: (path.stat().st_mtime_ns, path.parent.name))
    ]


def read_latest(directory: Path) -> str:
    """Return the tag that ``directory/latest`` names.

    Raises:
        CheckpointError: there is no such folder, no such file in it, or it names no tag.
    """
    if not directory.is_dir():
        raise CheckpointError(
            f"the checkpoint folder {str(directory)!r} does not exist",
            where="load_checkpoint",
            fix="check the path; save_checkpoint creates it",
        )
    try:
        content = (directory / LATEST).read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise _not_named(directory, "there is no file 'latest' that names the checkpoint to load") from None
        raise _not_named(directory, f"the file 'latest' cannot be read: {error.strerror}") from error
    try:
        return check_tag(content.decode().strip())
    except (CheckpointError, UnicodeDecodeError):
        raise _not_named(directory, f"the file 'latest' holds {content[:80]!r}, which is no tag") from None


def _not_named(directory: Path, what: str) -> CheckpointError:
    found = complete_tags(directory)
    fix = f"pass tag=, one of {', '.join(found)}" if found else "check the path: no checkpoint is in it"
    return CheckpointError(what, where=str(directory), fix=fix)


def write_latest(directory: Path, tag: str) -> None:
    """Make ``latest`` name ``tag``: in one step, durable on return."""
    replace_text(directory / LATEST, tag)
