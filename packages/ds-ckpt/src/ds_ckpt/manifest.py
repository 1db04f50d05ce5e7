"""The manifest of ds-sharded, version 1: what is in it, written and read. Loads no torch.

Note: the format. ``checkpoint.json`` is JSON in two parts. The first line has the format, its version and the checksum
of all that follows it; every byte of it is known, so any other byte is damage. Then::

    "world_size": 2,
    "files": {"rank_00000_0-<id>.safetensors": {"bytes": n, "checksum": "xxh3:...", "header": [n, "xxh3:..."]}, ...},
    "tensors": [{"name": ..., "kind": ..., "rank": null, "shape": [7, 5], "dtype": "float32", "chunks": [
        [file, offset, bytes, "xxh3:...", start, size, from, length], ...]}, ...],
    "state": {...},
    "rank_states": [{...}, {...}]

``file`` counts in the order of ``files``; ``offset`` is from the start of the file, so that reading a chunk needs no
header. A chunk is ``length`` elements of the box ``start``, ``size`` (both null: the whole tensor), counted row by row
``from`` its first. ``header`` is what a file has before its first chunk.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from ds_ckpt.checks import Field, check_chunks, damaged, parse_json
from ds_ckpt.checksums import checksum
from ds_ckpt.storage import folder_at
from ds_ckpt.stored import Stored, StoredChunk, StoredFile, StoredTensor
from ds_core.checkpoint.folder import MANIFEST
from ds_core.checkpoint.safetensors_format import MAX_HEADER_BYTES
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Chunk, LogicalTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ds_ckpt.storage import Folder
    from ds_ckpt.stored import Key

__all__ = ["FORMAT", "FORMAT_VERSION", "decode", "encode"]

FORMAT = "ds-sharded"
FORMAT_VERSION = 1
_CHECKSUM = re.compile(r"xxh3:[0-9a-f]{32}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


def encode(stored: Stored) -> bytes:
    """Return the manifest of ``stored``. Its state must be JSON."""
    index = {name: number for number, name in enumerate(stored.files)}
    files = {
        file.name: {"bytes": file.nbytes, "checksum": file.checksum, "header": file.header}
        for file in stored.files.values()
    }
    # A line per tensor, for those who look into it.
    tensors = ",\n".join(_json(_row(tensor, index)) for tensor in stored.tensors.values())
    body = (
        f'"world_size": {stored.world_size},\n'
        f'"files": {_json(files)},\n'
        f'"tensors": [\n{tensors}\n],\n'
        f'"state": {_json(dict(stored.state))},\n'
        f'"rank_states": {_json([dict(state) for state in stored.rank_states])}}}\n'
    ).encode()
    return _head(body) + body


def decode(data: bytes, folder: Folder | Path) -> Stored:
    """Return what the manifest ``data`` of ``folder`` says, checked in itself; files were not looked at.

    Raises:
        CheckpointError: it is damaged, of a later version, or says what cannot be; naming the field.
    """
    head, _, body = data.partition(b"\n")
    if data != _head(body) + body:
        raise _not_version_1(data, head, folder)
    top = Field(parse_json(data, folder, MANIFEST), "", folder, MANIFEST)
    world_size = top["world_size"].whole(1, 2**24)
    files = {name: _file(name, field) for name, field in top["files"].items()}
    names = list(files)
    tensors: dict[Key, StoredTensor] = {}
    for field in top["tensors"].list():
        tensor = _tensor(field, names, world_size)
        if tensor.key in tensors:
            raise field.wrong("each tensor once")
        tensors[tensor.key] = tensor
    check_chunks(tensors.values(), {name: file.nbytes for name, file in files.items()}, folder, MANIFEST)
    rank_states = tuple(field.object() for field in top["rank_states"].list(world_size))
    place, state = folder_at(folder), top["state"].object()
    return Stored(place, FORMAT, str(FORMAT_VERSION), world_size, tensors, files, state, rank_states)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _head(body: bytes) -> bytes:
    return f'{{"format": "{FORMAT}", "version": {FORMAT_VERSION}, "checksum": "{checksum(body)}",\n'.encode()


def _not_version_1(data: bytes, head: bytes, folder: Folder | Path) -> CheckpointError:
    later = re.match(rb'\{"format": "ds-sharded", "version": (\d{1,9}),', head)
    if later and int(later[1]) > FORMAT_VERSION:
        return CheckpointError(
            f"this checkpoint has version {int(later[1])} of its format, known is {FORMAT_VERSION}",
            where=f"{folder}/{MANIFEST}",
            fix="pip install --upgrade ds-ckpt",
        )
    return damaged(f"the manifest of {len(data)} bytes is damaged: they are not what was written", folder, MANIFEST)


def _row(tensor: StoredTensor, index: dict[str, int]) -> dict[str, Any]:
    of = tensor.of
    return {
        "name": of.name,
        "kind": of.kind,
        "rank": of.rank,
        "shape": of.shape,
        "dtype": of.dtype,
        "chunks": list(_chunk_rows(tensor.chunks, of.shape, index)),
    }


def _chunk_rows(chunks: Sequence[StoredChunk], shape: tuple[int, ...], index: dict[str, int]) -> Iterator[list[Any]]:
    whole = Chunk.whole(shape).box
    for stored in chunks:
        box = stored.chunk.box
        start, size = (None, None) if box == whole else (box.start, box.size)
        place = [index[stored.file], stored.offset, stored.nbytes, stored.checksum]
        yield [*place, start, size, stored.chunk.offset, stored.chunk.length]


def _file(name: str, field: Field) -> StoredFile:
    if not _NAME.fullmatch(name) or name == MANIFEST:
        raise field.wrong("under the plain name of a file, without a folder")
    nbytes, sum_of_all = field["bytes"].whole(), _checksum(field["checksum"])
    header_bytes, header_sum = field["header"].list(2)
    return StoredFile(
        name,
        nbytes,
        sum_of_all,
        (header_bytes.whole(8, min(nbytes, 8 + MAX_HEADER_BYTES)), _checksum(header_sum)),
    )


def _tensor(field: Field, names: Sequence[str], world_size: int) -> StoredTensor:
    rank = field.get("rank")
    of = LogicalTensor(
        field["name"].text(),
        field["kind"].text(),
        field["shape"].shape(),
        field["dtype"].dtype(),
        None if rank is None else rank.whole(0, world_size - 1),
    )
    chunks = []
    for row in field["chunks"].list():
        file, offset, nbytes, sum_of_chunk, *_ = row.list(8)
        place = Field(row.value[4:], row.way, *row.origin)
        chunks.append(
            StoredChunk(
                place.chunk(of.shape),
                names[file.whole(0, len(names) - 1)],
                offset.whole(),
                nbytes.whole(),
                _checksum(sum_of_chunk),
            )
        )
    return StoredTensor(of, tuple(chunks))


def _checksum(field: Field) -> str:
    if not _CHECKSUM.fullmatch(field.text()):
        raise field.wrong("a checksum such as 'xxh3:' and 32 hexadecimal digits")
    return field.text()
