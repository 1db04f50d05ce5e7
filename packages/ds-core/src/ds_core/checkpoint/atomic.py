"""Files that are whole or absent: written beside, synced, renamed. Loads no torch."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from ds_core.log import logger

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

__all__ = ["NotDurableError", "make_durable", "replace_text", "sync_folder", "written_beside"]


class NotDurableError(OSError):
    """What was written is in place and can be read, but a power failure may undo it."""


class written_beside:  # noqa: N801  a context manager, read as a verb
    """Open ``path.tmp``; on success sync and rename it to ``path``, durable under that name; on failure remove it.

    Raises:
        NotDurableError: ``path`` has the new content, but its folder cannot be synced.
        OSError: ``path`` is as it was.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.beside = path.with_name(path.name + ".tmp")

    def __enter__(self) -> BinaryIO:
        self.file = self.beside.open("wb")
        return self.file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        if error is not None:
            self._discard(error)
            return
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.beside.replace(self.path)
        except BaseException as failure:
            self._discard(failure)
            raise
        sync_folder(self.path.parent)

    def _discard(self, error: BaseException) -> None:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(self.path)  # a full disk is told without one
        # Closing tries to write once more what a full disk did not take; that it fails was told already.
        with contextlib.suppress(OSError):
            self.file.close()
        try:
            self.beside.unlink(missing_ok=True)
        except OSError as another:
            # The next write to this name begins it anew; what went wrong first must not be hidden.
            logger.debug("a half-written file cannot be removed: %s: %s", self.beside, another.strerror)


def replace_text(path: Path, text: str) -> None:
    """Give ``path`` the content ``text``: at any moment it has the old one or the new one whole. Durable on return."""
    with written_beside(path) as file:
        file.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Make durable which files and folders are in ``folder``.

    Raises:
        NotDurableError: they are there, but that cannot be synced.
        FileNotFoundError: there is no such folder.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise NotDurableError(error.errno, error.strerror, str(folder)) from error


def make_durable(folder: Path) -> None:
    """Make ``folder``, and those it is in, where they are missing; all that were made are durable on return."""
    missing = []
    at = folder
    while not at.exists() and at != at.parent:
        missing.append(at)
        at = at.parent
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        try:
            sync_folder(made.parent)
        except NotDurableError as error:
            if error.errno != errno.EACCES:
                raise
            # Folders can be made in one that may not be read, but it cannot be synced.
            logger.debug("a new folder may be lost in a power failure: %s: %s", made, error.strerror)
