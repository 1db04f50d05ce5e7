"""One file that ``torch.save`` wrote: its value, and where in the file each storage is. No storage is read.

Three kinds of bytes come first in such files: a zip archive (the usual form), or the older stream of pickles followed
by the storages, which DeepSpeed writes with ``"checkpoint_serialization": false``.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from ds_ckpt.checks import damaged
from ds_ckpt.formats.deepspeed.unpickle import Limits, unpickle
from ds_ckpt.storage.local import open_inside
from ds_core.checkpoint.safetensors_format import ITEM_BYTES
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ds_ckpt.formats.deepspeed.values import Storage

__all__ = ["TorchFile", "read_torch_file"]

_MAX_DIRECTORY_BYTES = 256 * 2**20
"""Of a zip archive's directory, with about 100 bytes per storage."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


@dataclass(frozen=True)
class TorchFile:
    """The parsed file."""

    name: str
    """Relative to the checkpoint's folder."""
    nbytes: int
    value: Any


def read_torch_file(folder: Path, name: str, limits: Limits | None = None) -> TorchFile:
    """Parse ``folder/name``; storages in the value know their place in the file, and lie inside it.

    Args:
        folder: the checkpoint's.
        name: relative to it, already known to stay inside; a link is refused.
        limits: of the pickle.

    Raises:
        CheckpointError: no such file, or one that ``torch.save`` does not write, damaged, or hostile.
    """
    try:
        with os.fdopen(open_inside(folder, name), "rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            head = file.read(4)
            if head == b"PK\x03\x04":
                value = _read_zip(file, name, limits)
            elif head[:1] == b"\x80":
                value = _read_legacy(file, name, limits)
            else:
                raise _damaged(f"it begins with {head!r}" if head else "it is empty", name)
    except OSError as error:
        raise damaged(f"a file of the checkpoint cannot be read: {error.strerror or error}", folder, name) from error
    except CheckpointError as error:
        if not (error.where or "").startswith(name):
            raise
        # What parses a file knows it by its name alone.
        raise CheckpointError(error.what, where=f"{folder}/{error.where}", fix=error.fix) from error.__cause__
    return TorchFile(name, nbytes, value)


def _damaged(what: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"this is no whole file of torch.save: {what}",
        where=name,
        fix="restore the file from a copy, or load another checkpoint",
    )


class _Bounded:
    """A file that ``zipfile`` may not read much of at once: a false length must not fill the memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek, self.tell, self.close = file.seek, file.tell, file.close
        self.seekable, self.readable = file.seekable, file.readable

    def read(self, count: int = -1) -> bytes:
        found = self.file.read(min(count, _MAX_DIRECTORY_BYTES + 1) if count >= 0 else _MAX_DIRECTORY_BYTES + 1)
        if len(found) > _MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its directory has more than {_MAX_DIRECTORY_BYTES} bytes")
        return found


def _read_zip(file: BinaryIO, name: str, limits: Limits | None) -> Any:
    root, places = _entries(file, name)
    if "data.pkl" not in places:
        raise _damaged(f"the archive has no {root}/data.pkl", name)
    order = _content(file, places, "byteorder", name) if "byteorder" in places else b"little"
    if order.strip() != b"little":
        raise CheckpointError(
            f"this file holds numbers in byte order {order[:20]!r}, known is 'little'",
            where=name,
            fix="load it on the kind of machine that wrote it and save it again here",
        )
    found = unpickle(_content(file, places, "data.pkl", name, (limits or Limits()).nbytes), file=name, limits=limits)
    for storage in found.storages.values():
        place = places.get(f"data/{storage.key}")
        if place is None:
            raise _damaged(f"storage {storage.key} is not in the archive", name)
        if place[1] != storage.nbytes:
            raise _damaged(f"storage {storage.key} has {place[1]} bytes instead of {storage.nbytes}", name)
        storage.offset = place[0]
    return found.value


def _entries(file: BinaryIO, name: str) -> tuple[str, dict[str, tuple[int, int]]]:
    """Return the archive's root folder, and for each entry its name below that -> (offset, bytes) of its content."""
    try:
        with zipfile.ZipFile(_Bounded(file)) as archive:
            infos, directory_at = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise _damaged(f"its archive cannot be read, {error}", name) from None
    places: dict[str, tuple[int, int]] = {}
    root = infos[0].filename.partition("/")[0] if infos else ""
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        top, _, inner = info.filename.partition("/")
        if top != root or not inner or ".." in inner.split("/") or inner in places:
            raise _damaged(f"its archive has an entry {info.filename[:80]!r} out of place, or twice", name)
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise _damaged(f"entry {inner[:80]!r} is compressed or encrypted", name)
        start = _content_start(file, info, name)
        # Entries lie one after the other, so no byte is counted twice and all are inside the file.
        if info.header_offset < end or start + info.file_size > directory_at:
            raise _damaged(f"entry {inner[:80]!r} overlaps another part of the file", name)
        end = start + info.file_size
        places[inner] = (start, info.file_size)
    return root, places


def _content_start(file: BinaryIO, info: zipfile.ZipInfo, name: str) -> int:
    """Return where an entry's content begins: its own header may be longer than the directory's (torch pads it)."""
    if info.header_offset < 0:
        raise _damaged(f"entry {info.filename[:80]!r} begins before the file", name)
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise _damaged(f"entry {info.filename[:80]!r} has no header", name)
    flags, method = struct.unpack("<HH", header[6:10])
    if method != 0 or flags & 1:
        raise _damaged(f"entry {info.filename[:80]!r} is compressed or encrypted", name)
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    own_name = file.read(name_bytes)
    if own_name.decode("utf-8", "replace") != info.orig_filename:
        raise _damaged(f"entry {info.filename[:80]!r} has another name in its own header", name)
    start: int = info.header_offset + 30 + name_bytes + extra_bytes
    return start


def _content(file: BinaryIO, places: Mapping[str, tuple[int, int]], entry: str, name: str, most: int = 1024) -> bytes:
    start, nbytes = places[entry]
    if nbytes > most:
        raise _damaged(f"{entry} has {nbytes} bytes, at most {most} are read", name)
    file.seek(start)
    return file.read(nbytes)


def _read_legacy(file: BinaryIO, name: str, limits: Limits | None) -> Any:
    """Parse magic, protocol, system, value and storage keys, each a pickle; then storages, each after its length."""
    with contextlib.closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as data:
        at, parts = 0, []
        for _ in range(5):
            # Keys and counts of tensors are limited per pickle: only one of the five is large.
            part = unpickle(data, file=name, start=at, limits=limits)
            parts.append(part)
            at = part.end
        magic, protocol, system, found, keys = parts
        if magic.value != _LEGACY_MAGIC or protocol.value != _LEGACY_PROTOCOL:
            raise _damaged("its first numbers are not those of torch.save", name)
        if type(system.value) is not dict or system.value.get("little_endian") is not True:
            raise _damaged("it was not written in little-endian order", name)
        if type(keys.value) is not list or not all(type(key) is str for key in keys.value):
            raise _damaged("it has no list of its storages", name)
        if len(set(keys.value)) != len(keys.value) or set(keys.value) != set(found.storages):
            raise _damaged("its list of storages is not that of its tensors", name)
        for key in keys.value:
            at = _place_legacy(found.storages[key], data, at, name)
    return found.value


def _place_legacy(storage: Storage, data: mmap.mmap, at: int, name: str) -> int:
    """Set the place of ``storage``, whose length is at byte ``at``; return where the next one begins."""
    if len(data) - at < 8:
        raise _damaged("it ends before its last storage", name)
    numel = int.from_bytes(data[at : at + 8], "little", signed=True)
    if numel != storage.numel:
        raise _damaged(f"storage {storage.key} has {numel} elements instead of {storage.numel}", name)
    storage.offset = at + 8
    end = storage.offset + numel * ITEM_BYTES[storage.dtype]
    if end > len(data):
        raise _damaged("it ends before its last storage", name)
    return end
