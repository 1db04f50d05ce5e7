"""Folders of this machine: opened step by step so that no link is followed, synced, renamed into place. No torch."""

from __future__ import annotations

import mmap
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ds_ckpt.checks import check_name, damaged
from ds_ckpt.checksums import BLOCK_BYTES
from ds_ckpt.storage import File, Folder
from ds_core.checkpoint.atomic import make_durable, sync_folder, written_beside
from ds_core.checkpoint.folder import complete_tags, read_latest
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

__all__ = ["LocalFolder", "open_inside"]


def open_inside(folder: Path, name: str) -> int:
    """Open ``name`` below ``folder`` for reading and return the descriptor; the caller closes it.

    Args:
        folder: may itself be a link.
        name: with ``/``; no part of it may be ``..`` or a link, and it is a regular file.

    Raises:
        CheckpointError: it leads elsewhere, is missing or is no regular file. Nothing outside was opened.
    """
    parts = check_name(name, folder)
    try:
        # A descriptor per step, so that no part of the path can be a link, or become one in between.
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            # Without O_NONBLOCK, opening a pipe waits for somebody to write to it.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_NONBLOCK if last else os.O_DIRECTORY)
            try:
                following = os.open(part, flags, dir_fd=at)
            finally:
                os.close(at)
            at = following
    except FileNotFoundError:
        raise damaged("a file of the checkpoint is missing", folder, name) from None
    except OSError as error:
        link = any((folder / "/".join(parts[:count])).is_symlink() for count in range(1, len(parts) + 1))
        what = "is a link, which may lead anywhere" if link else f"cannot be opened: {error.strerror}"
        raise damaged(f"a file of the checkpoint {what}", folder, name) from error
    if not stat.S_ISREG(os.fstat(at).st_mode):
        os.close(at)
        raise damaged("a file of the checkpoint is no regular file", folder, name)
    return at


class _LocalFile(File):
    """It stays open, and its mapping stays, as long as somebody holds it or a view of it."""

    is_mapped = True

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._mapped: mmap.mmap | None = None
        self._descriptor = open_inside(folder, name)
        self.nbytes = os.fstat(self._descriptor).st_size

    def read_into(self, offset: int, target: memoryview) -> bool:
        while target:
            count = self._read(target, offset)
            if not count:
                return False
            offset, target = offset + count, target[count:]
        return True

    def view(self, offset: int, nbytes: int) -> memoryview:
        if self._mapped is None:
            try:
                # Private to this process: torch warns of memory that it may not write to.
                self._mapped = mmap.mmap(self._descriptor, self.nbytes, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise self._unreadable(error) from error
        return memoryview(self._mapped)[offset : offset + nbytes]

    def blocks(self) -> Iterator[memoryview]:
        buffer, at = memoryview(bytearray(BLOCK_BYTES)), 0
        while count := self._read(buffer, at):
            at += count
            yield buffer[:count]

    def _read(self, target: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._descriptor, [target], offset)
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError | ValueError) -> CheckpointError:
        # A ValueError: it is shorter than it was.
        why = error.strerror if isinstance(error, OSError) else error
        return damaged(f"a file of the checkpoint cannot be read: {why}", self._folder, self._name)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


@dataclass(frozen=True)
class LocalFolder(Folder):
    """A folder of this machine. What is written is on the disk, not only with the system, once it counts."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> LocalFolder:
        return LocalFolder(self.path.parent)

    def __truediv__(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    def __str__(self) -> str:
        return str(self.path)

    def is_there(self) -> bool:
        return self.path.is_dir()

    def is_link(self) -> bool:
        return self.path.is_symlink()

    def identity(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _no_access(self.path, error) from error
        return found.st_dev, found.st_ino

    def has(self, name: str) -> bool:
        try:
            return not stat.S_ISDIR((self.path / name).lstat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise _no_access(self.path / name, error) from error

    def files(self) -> list[str]:
        return sorted(entry.name for entry in self._entries() if not entry.is_dir(follow_symlinks=False))

    def folders(self) -> list[str]:
        return sorted(entry.name for entry in self._entries() if _is_folder(entry))

    def changed_ns(self, name: str | None = None) -> int | None:
        path = self.path if name is None else self.path / name
        try:
            return (path.stat() if name is None else path.lstat()).st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _no_access(path, error) from error

    def complete_tags(self) -> list[str]:
        try:
            return complete_tags(self.path)
        except OSError as error:
            raise _no_access(self.path, error) from error

    def read_latest(self) -> str:
        return read_latest(self.path)

    def open(self, name: str) -> File:
        return _LocalFile(self.path, name)

    def read(self, name: str, limit: int) -> bytes:
        descriptor = open_inside(self.path, name)
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            if size > limit:
                raise damaged(f"a file of {size} bytes where at most {limit} are expected", self, name)
            return file.read(size)  # to ask for more would reserve it

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        found = {}
        for name in names:
            descriptor = open_inside(self.path, name)
            try:
                found[name] = os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)
        return found

    def make(self) -> None:
        make_durable(self.path)

    @contextmanager
    def create(self, name: str) -> Iterator[Callable[[memoryview], object]]:
        path = self.path / name
        try:
            # Nothing has this name: it carries the id of this save. An existing file is not ours to write to.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                yield partial(_write_all, descriptor)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            error.filename = str(path)
            raise

    def replace(self, name: str, data: bytes) -> None:
        with written_beside(self.path / name) as file:
            file.write(data)

    def sync(self) -> None:
        sync_folder(self.path)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def drop(self) -> None:
        try:
            self.path.rmdir()
        except FileNotFoundError:
            return
        sync_folder(self.path.parent)

    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.path) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _no_access(self.path, error) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link that leads to itself, or to where we may not look


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _no_access(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"it cannot be told what is there: {error.strerror}", where=str(path), fix="check who may read the folder"
    )
