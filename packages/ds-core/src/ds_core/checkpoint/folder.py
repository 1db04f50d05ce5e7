"""The folder users see: ``directory/<tag>/`` for each checkpoint, and ``directory/latest`` naming one of them."""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from typing import TYPE_CHECKING

from ds_core.checkpoint.atomic import replace_text
from ds_core.errors import CheckpointError, NoCheckpointError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "LATEST",
    "LATEST_UNIVERSAL",
    "MANIFEST",
    "PLAIN_FORMAT",
    "PLAIN_VERSION",
    "check_tag",
    "complete_tags",
    "is_a_tag",
    "is_deepspeed",
    "is_url",
    "read_latest",
    "write_latest",
]

LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
"""The file in which DeepSpeed's ``ds_to_universal`` names a tag."""
MANIFEST = "checkpoint.json"
"""Its presence makes a folder a checkpoint: it is written last."""
PLAIN_FORMAT = "ds-plain"
"""What the manifest of the core's own engine says, here for readers that load no torch."""
PLAIN_VERSION = 1
_MAX_LATEST_BYTES = 4096
_RESERVED = frozenset({"", ".", "..", LATEST, f"{LATEST}.tmp", LATEST_UNIVERSAL, MANIFEST, f"{MANIFEST}.tmp"})

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
        CheckpointError: it is empty, a file's that is beside or in tags (or its form while it is written), leads
            elsewhere, or would be another one once it was written to ``latest`` and read from there.
    """
    text = str(tag)
    # Cc: control characters; Cs: halves of characters, which no file can hold.
    is_lost = text != text.strip() or any(unicodedata.category(character) in ("Cc", "Cs") for character in text)
    if text in _RESERVED or "/" in text or "\\" in text or is_lost:
        raise CheckpointError(
            f"tag {text!r} cannot name a checkpoint", where="tag", fix="use a plain folder name, such as 'step_100'"
        )
    return text


def complete_tags(directory: Path) -> list[str]:
    """Return the tags in ``directory`` that are complete, newest last."""
    if not directory.is_dir():
        return []
    found = []
    for manifest in directory.glob(f"*/{MANIFEST}"):
        try:
            status = manifest.stat()
        except OSError:
            continue  # another job has just removed it, or it is a link that leads nowhere
        if stat.S_ISREG(status.st_mode):
            found.append((status.st_mtime_ns, manifest.parent.name))
    return [tag for _, tag in sorted(found)]


def is_deepspeed(folder: Path) -> bool:
    """Return whether ``folder`` has files named as DeepSpeed names them."""
    return next(folder.glob("*_states.pt"), None) is not None or (folder / "zero" / "optimizer_state.pt").is_file()


def read_latest(directory: Path) -> str:
    """Return the tag that ``directory/latest`` names.

    Raises:
        NoCheckpointError: there is no such folder, or no checkpoint in it.
        CheckpointError: checkpoints are in it, but no such file, or it names no tag; or it cannot be read.
    """
    try:
        if not stat.S_ISDIR(directory.stat().st_mode):
            raise CheckpointError(
                "this is no folder", where=str(directory), fix="pass the folder that checkpoints were saved to"
            )
    except FileNotFoundError:
        raise NoCheckpointError(
            f"the checkpoint folder {str(directory)!r} does not exist",
            where="load_checkpoint",
            fix="check the path; save_checkpoint creates it",
        ) from None
    except OSError as error:
        raise _unreadable(directory, error) from error
    try:
        content = _start_of(directory / LATEST, _MAX_LATEST_BYTES + 1)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise _not_named(directory, "there is no file 'latest' that names the checkpoint to load") from None
        if isinstance(error, PermissionError):
            raise _unreadable(directory, error) from error
        raise _named_wrongly(directory, f"the file 'latest' cannot be read: {error.strerror}") from error
    if len(content) > _MAX_LATEST_BYTES:
        raise _named_wrongly(directory, f"the file 'latest' holds {content[:80]!r} and more, which is no tag")
    try:
        return check_tag(content.decode().strip())
    except (CheckpointError, UnicodeDecodeError):
        raise _named_wrongly(directory, f"the file 'latest' holds {content[:80]!r}, which is no tag") from None


def _start_of(path: Path, nbytes: int) -> bytes:
    """Return the first bytes of a regular file: a link may lead to what never ends, a pipe to nobody who writes."""
    try:
        # Without O_NONBLOCK, opening a pipe waits for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, "it is a link" if path.is_symlink() else error.strerror) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return os.read(descriptor, nbytes)
    finally:
        os.close(descriptor)


def _not_named(directory: Path, what: str) -> CheckpointError:
    """Return what is wrong with a folder that has no ``latest``."""
    if (directory / MANIFEST).is_file() or is_deepspeed(directory):
        return is_a_tag(str(directory), str(directory.parent), directory.absolute().name)
    try:
        folders = [path for path in directory.iterdir() if path.is_dir()]
    except OSError as error:
        return _unreadable(directory, error)
    found = complete_tags(directory)
    found += sorted(path.name for path in folders if path.name not in found and is_deepspeed(path))
    if found:
        return CheckpointError(what, where=str(directory), fix=f"pass tag=, one of {', '.join(found)}")
    return NoCheckpointError(what, where=str(directory), fix="check the path: no checkpoint is in it")


def _named_wrongly(directory: Path, what: str) -> CheckpointError:
    found = complete_tags(directory)
    fix = f"pass tag=, one of {', '.join(found)}" if found else "check the path: no checkpoint is in it"
    return CheckpointError(what, where=str(directory), fix=fix)


def is_a_tag(place: str, parent: str, tag: str) -> CheckpointError:
    """Return the error of a load from the folder of a tag, where that of the tags is expected."""
    return CheckpointError(
        f"this is the checkpoint {tag!r} itself, not the folder it is in",
        where=place,
        fix=f"load_checkpoint({parent!r}, tag={tag!r})",
    )


def _unreadable(directory: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"the folder cannot be read: {error.strerror}", where=str(directory), fix="check its permissions and the disk"
    )


def write_latest(directory: Path, tag: str) -> None:
    """Make ``latest`` name ``tag``: in one step, durable on return."""
    replace_text(directory / LATEST, tag)
