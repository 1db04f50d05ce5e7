"""Files that are whole or absent: written beside, synced, renamed. Loads no torch."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

__all__ = ["replace_text", "sync_folder", "written_beside"]


class written_beside:  # noqa: N801  a context manager, read as a verb
    """Open ``path.tmp``; on success sync and rename it to ``path``, durable under that name; on failure remove it."""

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
        self.beside.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Give ``path`` the content ``text``: at any moment it has the old one or the new one whole. Durable on return."""
    with written_beside(path) as file:
        file.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
