"""What every reader of a folder checks before it believes it: files, values of JSON, chunks. Loads no torch.

A checkpoint may come from anywhere. Its names must stay inside its folder, its numbers must fit its files, and what it
makes us hold must be bounded by what its files hold.
"""

from __future__ import annotations

import itertools
import json
import math
import reprlib
from typing import TYPE_CHECKING, Any

from ds_ckpt.storage import folder_at
from ds_core.checkpoint import safetensors_format
from ds_core.checkpoint.coverage import not_once
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Box, Chunk

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from ds_ckpt.storage import Folder
    from ds_ckpt.stored import StoredTensor

__all__ = [
    "ITEM_BYTES",
    "MAX_JSON_BYTES",
    "Field",
    "check_chunks",
    "check_name",
    "damaged",
    "parse_json",
    "short",
]

ITEM_BYTES = {dtype: safetensors_format.ITEM_BYTES[dtype] for dtype in safetensors_format.WORDS}
"""torch's word of a dtype -> bytes of an element: what a checkpoint may hold."""
MAX_JSON_BYTES = 2**28
"""A larger manifest or header is refused: parsed, JSON takes several times its size."""
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring = 2, 4, 4, 80
MAX_DIMS = 64
"""torch's own limit."""


def damaged(what: str, folder: Folder | Path, file: str | None = None) -> CheckpointError:
    """Return the error that a checkpoint cannot be used, naming another one to load.

    Args:
        what: what is wrong, with the field or tensor.
        folder: the tag's.
        file: the name in it; None where it is the folder itself.
    """
    place = folder_at(folder)
    try:
        others = [tag for tag in place.parent.complete_tags() if tag != place.name]
    except CheckpointError:
        others = []  # a store that does not answer must not hide what was found
    fix = f"load another one, such as tag={others[-1]!r}" if others else "restore it from a copy"
    return CheckpointError(what, where=f"{place}/{file}" if file else str(place), fix=fix)


def check_name(name: str, folder: Folder | Path) -> list[str]:
    """Return the parts of the name of a file below ``folder``.

    Raises:
        CheckpointError: it leads elsewhere, or is none that a file can have.
    """
    parts = name.split("/")
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise damaged(f"the name {short(name)} of a file leads out of the checkpoint", folder)
    if not _is_text(name) or len(name.encode()) > 4000 or any(len(part.encode()) > 255 for part in parts):
        raise damaged(f"the name {short(name)} of a file is none that a file can have", folder)
    return parts


def parse_json(data: bytes, folder: Folder | Path, file: str, part: str = "") -> Any:
    """Return ``data`` as JSON.

    Args:
        data: at most ``MAX_JSON_BYTES``.
        folder: of the checkpoint, for errors.
        file: the name in it, for errors.
        part: of the file, for errors.

    Raises:
        CheckpointError: it is not JSON, or nested too deeply.
    """
    what = f"{part or 'the file'} is not JSON"
    try:
        return json.loads(data.decode())  # of bytes it would take UTF-16 and UTF-32, too
    except RecursionError:
        raise damaged(f"{what} that can be read: it is nested too deeply", folder, file) from None
    except ValueError as error:
        raise damaged(f"{what}: {str(error)[:200]}", folder, file) from None


def _is_text(value: str) -> bool:
    """Return whether ``value`` can be printed and be a name: JSON may hold halves of characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def short(value: object) -> str:
    """Return ``value`` in few characters, however large it is, for an error."""
    return _REPR.repr(value)


class Field:
    """A value of parsed JSON with the way that leads to it, so that every refusal says which field of which file."""

    def __init__(self, value: Any, way: str, folder: Folder | Path, file: str) -> None:
        self.value, self.way, self.origin = value, way, (folder, file)

    def wrong(self, expected: str) -> CheckpointError:
        """Return the error that this field is not what was expected."""
        return damaged(f"{self.way or 'the whole'}: expected {expected}, found {short(self.value)}", *self.origin)

    def __getitem__(self, key: str) -> Field:
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        if key not in self.value:
            raise self.wrong(f"a key {key!r}")
        return self._inner(self.value[key], f"{self.way}.{key}" if self.way else key)

    def get(self, key: str) -> Field | None:
        """Return the field ``key`` of an object, None where it is missing or null."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return None if self.value.get(key) is None else self[key]

    def list(self, length: int | None = None) -> list[Field]:
        """Return the items of a list, of ``length`` if given."""
        if not isinstance(self.value, list) or (length is not None and len(self.value) != length):
            raise self.wrong("a list" if length is None else f"a list of {length} items")
        return [self._inner(item, f"{self.way}[{index}]") for index, item in enumerate(self.value)]

    def items(self) -> Iterable[tuple[str, Field]]:
        """Return the keys and fields of an object."""
        return [(key, self[key]) for key in self.object()]

    def object(self) -> Mapping[str, Any]:
        """Return the value, an object, as it is."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return self.value

    def text(self, limit: int = 4096) -> str:
        """Return a text of at most ``limit`` characters."""
        if not isinstance(self.value, str) or len(self.value) > limit or not _is_text(self.value):
            raise self.wrong(f"a text of at most {limit} characters")
        return self.value

    def whole(self, low: int = 0, high: int = 2**62) -> int:
        """Return a whole number in ``low..high``."""
        if type(self.value) is not int or not low <= self.value <= high:
            raise self.wrong(f"a whole number from {low} to {high}")
        return self.value

    def shape(self) -> tuple[int, ...]:
        """Return sizes whose product a file offset can hold."""
        sizes = self.list()
        if len(sizes) > MAX_DIMS:
            raise self.wrong(f"at most {MAX_DIMS} dimensions")
        found = tuple(size.whole() for size in sizes)
        if math.prod(found) >= 2**62:
            raise self.wrong("a shape of fewer than 2**62 elements")
        return found

    def dtype(self) -> str:
        """Return the word of a dtype that is known."""
        if not isinstance(self.value, str) or self.value not in ITEM_BYTES:
            raise self.wrong(f"a dtype, one of {', '.join(ITEM_BYTES)}")
        return self.value

    def chunk(self, of: tuple[int, ...]) -> Chunk:
        """Return ``[start, size, offset, length]``, ``start`` null for the whole box, as a chunk of shape ``of``."""
        start, size, offset, length = self.list(4)
        if start.value is None:
            box = Box((0,) * len(of), of)
        else:
            box = Box(tuple(s.whole() for s in start.list(len(of))), tuple(s.whole() for s in size.list(len(of))))
            if any(a + n > full for a, n, full in zip(box.start, box.size, of, strict=True)):
                raise self.wrong(f"a box inside {list(of)}")
        at = offset.whole(0, box.numel)
        return Chunk(box, at, length.whole(0, box.numel - at))

    def _inner(self, value: Any, way: str) -> Field:
        return Field(value, way, *self.origin)


def check_chunks(
    tensors: Iterable[StoredTensor], sizes: Mapping[str, int], folder: Folder | Path, file: str | None
) -> None:
    """Check that chunks are where files have bytes, share none, and hold every element of their tensor once.

    Args:
        tensors: all of the checkpoint.
        sizes: bytes of each file.
        folder: of the checkpoint, for errors.
        file: what says so, for errors.

    Raises:
        CheckpointError: naming the tensor.
    """
    ranges: dict[str, list[tuple[int, int, str]]] = {}
    for tensor in tensors:
        label = f"{tensor.of.kind} {tensor.of.name!r}"
        item_bytes = ITEM_BYTES[tensor.of.dtype]
        for chunk in tensor.chunks:
            if chunk.nbytes != chunk.chunk.length * item_bytes:
                raise damaged(
                    f"{label}: a chunk of {chunk.chunk.length} elements of {tensor.of.dtype} has {chunk.nbytes} bytes",
                    folder,
                    file,
                )
            if chunk.file not in sizes:
                raise damaged(f"{label}: its file {chunk.file!r} is not one of the checkpoint's", folder, file)
            if chunk.offset + chunk.nbytes > sizes[chunk.file]:
                raise damaged(f"{label}: a chunk reaches behind the end of {chunk.file}", folder, file)
            if chunk.nbytes:
                ranges.setdefault(chunk.file, []).append((chunk.offset, chunk.offset + chunk.nbytes, label))
        problem = not_once(tensor.of.shape, [chunk.chunk for chunk in tensor.chunks])
        if problem:
            raise damaged(f"{label}: {problem}", folder, file)
    for name, found in ranges.items():
        found.sort()
        for (_, end, one), (begin, _, other) in itertools.pairwise(found):
            if begin < end:
                raise damaged(f"{one} and {other} share bytes of {name}", folder, file)
