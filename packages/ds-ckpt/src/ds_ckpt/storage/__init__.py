"""Places that checkpoints are kept in: a folder of this machine's, or one of a store that fsspec reaches. No torch.

Formats, loading and the engines are written against :class:`Folder` alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from os import PathLike
    from pathlib import Path

__all__ = ["File", "Folder", "folder_at"]


class File(ABC):
    """A file of a checkpoint, open for reading. Threads may share it; it is let go of with the last reference."""

    nbytes: int
    """Its size when it was opened."""
    is_mapped: bool
    """Whether :meth:`view` is memory of the file itself, so that what was checked once need not be again."""

    @abstractmethod
    def read_into(self, offset: int, target: memoryview) -> bool:
        """Fill ``target`` with the bytes from ``offset``; return whether there were so many."""

    @abstractmethod
    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return ``nbytes`` from ``offset``, less where the file ends before; they may be written to, unseen by others.

        Mapped, the view keeps the mapping; else it is a copy, a new one each time.
        """

    @abstractmethod
    def blocks(self) -> Iterator[memoryview]:
        """Yield all of its bytes in order; a block is only good until the next one."""


class Folder(ABC):
    """A folder, there or not. ``str`` of it is what a user would give for it.

    Files are named relative to it. A name that is read may have ``/``: no part of it may be ``..`` or lead elsewhere.
    A name that is written, removed or asked about is a plain one. Methods raise ``CheckpointError``, those that write
    also ``OSError``.
    """

    path: Path | None
    """Where it is on this machine; None in a store."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part of its path."""

    @property
    @abstractmethod
    def parent(self) -> Folder:
        """The folder it is in; itself where it is in none."""

    @abstractmethod
    def __truediv__(self, name: str) -> Folder:
        """Return the folder ``name`` in it."""

    # -- what is there ------------------------------------------------------------------------------------------------

    @abstractmethod
    def is_there(self) -> bool:
        """Return whether there is such a folder. A store may have none without files in it."""

    @abstractmethod
    def is_link(self) -> bool:
        """Return whether its name is that of a link, which may lead anywhere."""

    @abstractmethod
    def identity(self) -> Hashable | None:
        """Return what every name that leads to this folder has in common, and no other folder has.

        None where it has to be there to be known, and is not.
        """

    @abstractmethod
    def has(self, name: str) -> bool:
        """Return whether it has a file ``name``, be it a link that leads nowhere; a folder of that name is none."""

    @abstractmethod
    def files(self) -> list[str]:
        """Return the names of the files directly in it, sorted; links count as files. None where it is not there."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Return the names of the folders and links to folders in it, sorted; none where it is not there."""

    @abstractmethod
    def changed_ns(self, name: str | None = None) -> int | None:
        """Return when a file of it was last written, or the folder itself; None where that is not known.

        In nanoseconds since 1970, by the clock of whoever keeps the files.
        """

    @abstractmethod
    def complete_tags(self) -> list[str]:
        """Return the folders in it that have a manifest, newest last."""

    @abstractmethod
    def read_latest(self) -> str:
        """Return the tag that the file ``latest`` in it names.

        Raises:
            CheckpointError: there is no such folder, no such file, or it names no tag.
        """

    # -- reading ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def open(self, name: str) -> File:
        """Open a file.

        Raises:
            CheckpointError: it is missing, no regular file, or its name leads elsewhere. Nothing outside was opened.
        """

    @abstractmethod
    def read(self, name: str, limit: int) -> bytes:
        """Return all of a small file; it may be replaced at the same time.

        Raises:
            CheckpointError: as :meth:`open`; or it has more than ``limit`` bytes.
        """

    @abstractmethod
    def sizes(self, names: Sequence[str]) -> Mapping[str, int]:
        """Return the size of each of these files.

        Raises:
            CheckpointError: as :meth:`open`.
        """

    # -- writing ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def make(self) -> None:
        """Make it and those it is in, where they are missing and places like this need that."""

    @abstractmethod
    def create(self, name: str) -> AbstractContextManager[Callable[[memoryview], object]]:
        """Write a new file, by what the context gives; its content is durable once the context is left.

        The name of the file is durable once :meth:`sync` was called. After a failure there may be a part of it.
        """

    @abstractmethod
    def replace(self, name: str, data: bytes) -> None:
        """Give the file ``name`` the content ``data``: at any moment it has the old one or the new one. Durable."""

    @abstractmethod
    def sync(self) -> None:
        """Make durable which files and folders are in it."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, or a link; one that is not there is no error."""

    @abstractmethod
    def drop(self) -> None:
        """Remove the folder, which has no files or folders any more; what is not there is no error.

        Raises:
            OSError: there is something in it.
        """


def folder_at(place: str | PathLike[str] | Folder) -> Folder:
    """Return the folder at a path or URL. It need not be there; nothing is looked up.

    Args:
        place: text with ``scheme://`` at its start is a URL, everything else a path.

    Raises:
        CheckpointError: a URL that cannot name a folder, or one whose package is not installed.
    """
    if isinstance(place, Folder):
        return place
    from ds_core.checkpoint.folder import is_url

    if isinstance(place, str) and is_url(place):
        from ds_ckpt.storage.remote import folder_at_url

        return folder_at_url(place)
    from pathlib import Path

    from ds_ckpt.storage.local import LocalFolder

    return LocalFolder(Path(place))
