"""The safetensors format: its words for dtypes, its header, and a writer that streams. Loads no torch.

Reference:
    https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ds_core.checkpoint.atomic import written_beside
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

__all__ = ["ITEM_BYTES", "MAX_HEADER_BYTES", "WORDS", "Entry", "header", "write_stream"]

MAX_HEADER_BYTES = 10**8
"""Readers of the format refuse a longer header."""

WORDS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""torch's word of a dtype -> that of the safetensors format."""
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    # Not in the format, but in files of torch.
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "complex64": 8,
    "complex128": 16,
}
"""torch's word of a dtype -> bytes of an element."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file."""

    name: str
    dtype: str
    """torch's own word without the prefix, such as ``float32``."""
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise _refused(self, ITEM_BYTES)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


def header(entries: Sequence[Entry], metadata: Mapping[str, str], path: object) -> bytes:
    """Return all that comes before the first tensor, which starts at a multiple of 8.

    Args:
        entries: in the order of the file. Wider dtypes should come first, so that all are aligned.
        metadata: strings of the writer's own.
        path: of the file, for errors.

    Raises:
        CheckpointError: a dtype the format does not have, two tensors of one name, or more than a header may hold.
    """
    for entry in entries:
        if entry.dtype not in WORDS:
            raise _refused(entry, WORDS)
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for entry in entries:
        if entry.name in table:
            raise CheckpointError(
                f"two tensors of one file are called {entry.name!r}", where=str(path), fix="rename one"
            )
        offsets = [at, at + entry.nbytes]
        table[entry.name] = {"dtype": WORDS[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        at += entry.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that readers can map tensors
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{len(entries)} tensors need a header of {len(text)} bytes, readers take {MAX_HEADER_BYTES}",
            where=str(path),
            fix="shorten the names of the tensors, or write fewer into one file",
        )
    return len(text).to_bytes(8, "little") + text


def _refused(entry: Entry, allowed: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"dtype torch.{entry.dtype} cannot be stored in a safetensors file",
        where=f"tensor {entry.name!r}",
        fix=f"one of {', '.join(allowed)}",
    )


def write_stream(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str], read: Callable[[Entry], Iterable[Any]]
) -> int:
    """Write a file whose tensors are had one after the other; durable under its name on return.

    Args:
        path: written as ``path.tmp`` beside, then renamed.
        entries: in the order of the file.
        metadata: strings for the header.
        read: called once per entry, in order; returns its elements row by row, as one or more buffers of bytes.

    Returns:
        The size of the file in bytes.

    Raises:
        CheckpointError: a dtype the format does not have, or two tensors of one name.
        OSError: the disk is full, the folder is read-only, ...; the partial file is removed.
    """
    head = header(entries, metadata, path)
    with written_beside(path) as file:
        file.write(head)
        for entry in entries:
            written = sum(file.write(block) for block in read(entry))
            assert written == entry.nbytes, f"{entry}: {written} bytes"
    return len(head) + sum(entry.nbytes for entry in entries)
