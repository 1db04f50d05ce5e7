"""Folders of a store that fsspec reaches, such as ``s3://bucket/run``. Loads no torch, and fsspec only when used.

Note: one put. An object that was put is whole and durable, and one that is put over another replaces it in one step. So
the manifest needs no rename: it is put last. What a killed save left are objects that no manifest names.

Note: listings. fsspec keeps what it listed; others write too, so that is dropped before each look.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from contextlib import contextmanager
from datetime import timezone
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ds_ckpt.checks import check_name, damaged, short
from ds_ckpt.storage import File, Folder
from ds_core.checkpoint.folder import LATEST, MANIFEST, check_tag, is_a_tag
from ds_core.errors import CheckpointError, NoCheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from fsspec import AbstractFileSystem

__all__ = ["RemoteFolder", "folder_at_url"]

_BLOCK_BYTES = 2**25
"""A request costs as much time as some megabytes."""
_MAX_TAG_BYTES = 4096
_SPECIAL = re.compile(r"[?#%]|::|://")
"""What some stores read as more than letters of a name."""


class RemoteFolder(Folder):
    """A folder of a store. It is there as long as there are objects in it."""

    path = None

    def __init__(self, fs: AbstractFileSystem, root: str, url: str) -> None:
        """``root``: the folder as ``fs`` names it; ``url``: as users do; neither ends with a slash."""
        self._fs, self._root, self._url = fs, root, url

    @property
    def name(self) -> str:
        return self._root.rpartition("/")[2]

    @property
    def parent(self) -> RemoteFolder:
        above = self._root.rpartition("/")[0]
        return RemoteFolder(self._fs, above, self._url.rpartition("/")[0]) if above else self

    def __truediv__(self, name: str) -> RemoteFolder:
        return RemoteFolder(self._fs, self._at(name), f"{self._url}/{name}")

    def __str__(self) -> str:
        return self._url

    # -- what is there ------------------------------------------------------------------------------------------------

    def is_there(self) -> bool:
        return bool(self._entries()) or (self._info() or {}).get("type") == "directory"

    def is_link(self) -> bool:
        """No: what a store has of links is not among its folders."""
        return False

    def identity(self) -> str:
        return self._root

    def has(self, name: str) -> bool:
        found = self._info(name)
        return found is not None and found["type"] != "directory"

    def files(self) -> list[str]:
        return sorted(name for name, entry in self._entries().items() if entry["type"] != "directory")

    def folders(self) -> list[str]:
        return sorted(name for name, entry in self._entries().items() if entry["type"] == "directory")

    def changed_ns(self, name: str | None = None) -> int | None:
        if name is None:
            # Stores keep no time of a folder.
            times = [time for time in map(self.changed_ns, self.files()) if time is not None]
            return max(times, default=None)
        with self._asked("tell when a file was written", name):
            try:
                modified = self._fs.modified(self._at(name))
            except (FileNotFoundError, NotImplementedError):
                return None
            # Without a zone it is what the store says, and no store knows the zone of this machine.
            zoned = modified if modified.tzinfo is not None else modified.replace(tzinfo=timezone.utc)
            return int(zoned.timestamp() * 1e9)

    def complete_tags(self) -> list[str]:
        complete = [name for name in self.folders() if (self / name).has(MANIFEST)]
        return sorted(complete, key=lambda name: ((self / name).changed_ns(MANIFEST) or 0, name))

    def read_latest(self) -> str:
        if not self.has(LATEST):
            if not self.is_there():
                raise NoCheckpointError(
                    f"the checkpoint folder {self._url!r} does not exist",
                    where="load_checkpoint",
                    fix="check the URL; save_checkpoint creates it",
                )
            if self.has(MANIFEST):
                parent, _, tag = self._url.rstrip("/").rpartition("/")
                raise is_a_tag(self._url, parent, tag)
            found = self.complete_tags()
            raise (CheckpointError if found else NoCheckpointError)(
                "there is no file 'latest' that names the checkpoint to load",
                where=self._url,
                fix=f"pass tag=, one of {', '.join(found)}" if found else "check the URL: no checkpoint is in it",
            )
        return check_tag(self.read(LATEST, _MAX_TAG_BYTES).decode(errors="replace").strip())

    # -- reading ------------------------------------------------------------------------------------------------------

    def open(self, name: str) -> File:
        return _RemoteFile(self, name, self._size(name))

    def read(self, name: str, limit: int) -> bytes:
        self._within(self._size(name), limit, name)
        # Not by a range: it may have been replaced since, by one of another size.
        data = self.fetch(name)
        self._within(len(data), limit, name)
        return data

    def sizes(self, names: Sequence[str]) -> Mapping[str, int]:
        # One listing: a checkpoint of many ranks has thousands of files.
        entries = self._entries()
        found = {}
        for name in names:
            entry = entries.get(name, {})
            # What was not listed like that, be it in a folder below, is asked for, and refused, by itself.
            listed = entry["size"] if _is_file(entry) and isinstance(entry.get("size"), int) else None
            found[name] = self._size(name) if listed is None else listed
        return found

    def fetch(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return the bytes of a file from ``start`` to ``end``, less where it ends before."""
        with self._asked("give a file", name):
            try:
                data: bytes = self._fs.cat_file(self._at(name), start=start, end=end)
            except FileNotFoundError:
                raise damaged("a file of the checkpoint is missing", self, name) from None
            return data

    # -- writing ------------------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Nothing: :meth:`create` makes folders where a store has such."""

    @contextmanager
    def create(self, name: str) -> Iterator[Callable[[memoryview], object]]:
        file = self._new(name)

        def write(data: memoryview) -> None:
            with self._asked("take a file", name):
                file.write(data)

        try:
            yield write
        except BaseException:
            # The upload ends with what it has; who asked for the file removes it, and no manifest will name it.
            with contextlib.suppress(Exception):
                file.close()
            raise
        with self._asked("take a file", name):
            file.close()

    def replace(self, name: str, data: bytes) -> None:
        with self._asked("take a file", name):
            self._fs.pipe_file(self._at(name), data)

    def sync(self) -> None:
        """Nothing: what was put is there."""

    def remove(self, name: str) -> None:
        with self._asked("remove a file", name), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def drop(self) -> None:
        if self._entries():
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), self._url)
        # Most stores have no folder any more once it has no files; what has no folder above it may be a whole bucket.
        if self.parent is not self and self._info() is not None:
            with self._asked("remove a folder"), contextlib.suppress(FileNotFoundError):
                self._fs.rmdir(self._root)

    def _new(self, name: str) -> Any:
        with self._asked("take a file", name):
            try:
                return self._fs.open(self._at(name), "wb")
            except FileNotFoundError:
                # A store of real folders.
                self._fs.makedirs(self._root, exist_ok=True)
                return self._fs.open(self._at(name), "wb")

    # -- asking -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _asked(self, doing: str, name: str | None = None) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            # Every store has errors of its own, and many of them derive from nothing else.
            told = f"{type(error).__name__}: {str(error)[:300]}"
            raise CheckpointError(
                f"the store did not {doing}: {told}",
                where=self._url if name is None else f"{self._url}/{name}",
                fix="check the URL, who may use it and the connection",
            ) from error

    def _at(self, name: str) -> str:
        """Return ``name`` in this folder as the store names it."""
        check_name(name, self)
        if _SPECIAL.search(name):
            raise CheckpointError(
                f"{short(name)} cannot be the name of a file in a store",
                where=self._url,
                fix="use letters, digits, '-', '_' and '.'",
            )
        return f"{self._root}/{name}"

    def _info(self, name: str | None = None) -> dict[str, Any] | None:
        path = self._root if name is None else self._at(name)
        with self._asked("tell what is there", name):
            self._fs.invalidate_cache(path.rpartition("/")[0])
            try:
                found: dict[str, Any] = self._fs.info(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
            return found

    def _entries(self) -> dict[str, dict[str, Any]]:
        """Return what is directly in the folder, by name."""
        with self._asked("tell what is there"):
            self._fs.invalidate_cache(self._root)
            try:
                listed = self._fs.ls(self._root, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        # Some stores list the folder itself among what is in it.
        own = self._root.strip("/")
        paths = {entry["name"].strip("/"): entry for entry in listed}
        return {path.rpartition("/")[2]: entry for path, entry in paths.items() if path != own}

    def _size(self, name: str) -> int:
        found = self._info(name)
        if found is None:
            raise damaged("a file of the checkpoint is missing", self, name)
        if not _is_file(found):
            raise damaged("a file of the checkpoint is no regular file", self, name)
        if not isinstance(found.get("size"), int):
            raise damaged("the store does not tell the size of a file of the checkpoint", self, name)
        return int(found["size"])

    def _within(self, nbytes: int, limit: int, name: str) -> None:
        if nbytes > limit:
            raise damaged(f"a file of {nbytes} bytes where at most {limit} are expected", self, name)


class _RemoteFile(File):
    is_mapped = False

    def __init__(self, folder: RemoteFolder, name: str, nbytes: int) -> None:
        self._folder, self._name, self.nbytes = folder, name, nbytes

    def read_into(self, offset: int, target: memoryview) -> bool:
        if not target:
            return True
        data = self._fetch(offset, len(target))
        if len(data) != len(target):
            return False
        target[:] = data
        return True

    def view(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(bytearray(self._fetch(offset, nbytes)))

    def blocks(self) -> Iterator[memoryview]:
        for at in range(0, self.nbytes, _BLOCK_BYTES):
            yield memoryview(self._fetch(at, min(_BLOCK_BYTES, self.nbytes - at)))

    def _fetch(self, offset: int, nbytes: int) -> bytes:
        # Some stores answer a range behind the end with an error that is like any other.
        end = min(offset + nbytes, self.nbytes)
        return self._folder.fetch(self._name, offset, end) if offset < end else b""


def _is_file(entry: Mapping[str, Any]) -> bool:
    return entry.get("type") == "file" and not entry.get("islink")


def folder_at_url(url: str) -> Folder:
    """Return the folder at ``url``; ``file://`` is a folder of this machine.

    Raises:
        CheckpointError: it cannot name a folder, nobody knows its scheme, or the package for it is not installed.
    """
    scheme, _, rest = url.partition("://")
    if re.match(r"[^/@]*:[^/@]*@", rest):
        raise CheckpointError(
            f"the {scheme}:// URL of the checkpoints has a password, which messages would show",
            where="save_dir, load_dir or DIR",
            fix="give it to fsspec in its configuration files or environment variables",
        )
    rest = rest.rstrip("/")
    is_local = scheme in ("file", "local")
    # A store's names are as they are written.
    path = unquote(rest) if is_local else rest
    if not rest or any(part in ("", ".", "..") for part in path.removeprefix("/").split("/")):
        raise _bad_url(url, "it has no folder, or a part of it is empty, '.' or '..'")
    if re.search(r"[\0\\?#]", rest) or "\0" in path:
        raise _bad_url(url, "it has a letter that stores read as more than one")
    if is_local:
        from pathlib import Path

        from ds_ckpt.storage.local import LocalFolder

        if not rest.startswith("/"):
            raise _bad_url(url, "its path is not absolute: a third slash is missing")
        return LocalFolder(Path(path))
    fs, root = _connect(f"{scheme}://{rest}", scheme.rpartition(":")[2])
    return RemoteFolder(fs, root.rstrip("/"), f"{scheme}://{rest}")


def _bad_url(url: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"the URL {short(url)} cannot name a folder of checkpoints: {why}",
        where="save_dir, load_dir or DIR",
        fix="write it like s3://bucket/run, or file:///data/run",
    )


def _connect(url: str, scheme: str) -> tuple[AbstractFileSystem, str]:
    """Return what speaks for the store, and the path in it."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    try:
        fs, root = url_to_fs(url)
    except ImportError as error:
        # "s3fs.S3FileSystem": what it is installed by; what is part of fsspec itself says what else it needs.
        package = known_implementations.get(scheme, {}).get("class", "").partition(".")[0]
        is_own = package in ("", "fsspec")
        raise CheckpointError(
            f"{scheme}:// needs a package that is not installed: {error}",
            where=url,
            fix=f'pip install "fsspec[{scheme}]"' if is_own else f"pip install {package}",
        ) from error
    except Exception as error:
        # As above: also a scheme that nobody knows.
        raise CheckpointError(
            f"the store cannot be reached: {type(error).__name__}: {str(error)[:300]}",
            where=url,
            fix="check the URL, and the configuration of fsspec for it",
        ) from error
    return fs, root
