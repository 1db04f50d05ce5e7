"""Reads ds-plain, what the core's own engine writes: a manifest of sizes, and tables in headers. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ds_ckpt.checks import ITEM_BYTES, Field, check_chunks, damaged, parse_json
from ds_ckpt.stored import Stored, StoredChunk, StoredFile, StoredTensor
from ds_core.checkpoint.folder import MANIFEST, PLAIN_FORMAT, PLAIN_VERSION
from ds_core.checkpoint.safetensors_format import MAX_HEADER_BYTES, WORDS
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import LogicalTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ds_ckpt.storage import Folder
    from ds_ckpt.stored import Key

__all__ = ["is_plain", "read_manifest"]

_DTYPES = {word: dtype for dtype, word in WORDS.items()}
"""Word of the safetensors format -> torch's."""


def is_plain(manifest: Any) -> bool:
    """Return whether a parsed manifest is of this format."""
    return isinstance(manifest, dict) and manifest.get("format") == PLAIN_FORMAT


def read_manifest(manifest: Any, folder: Folder) -> Stored:
    """Return what the checkpoint in ``folder`` with a parsed manifest holds. It has sizes, and no checksums.

    Raises:
        CheckpointError: the manifest or a header is damaged or says what cannot be; a file is missing or cut short.
    """
    top = Field(manifest, "", folder, MANIFEST)
    version = top["version"].whole()
    if version > PLAIN_VERSION:
        raise CheckpointError(
            f"this checkpoint has version {version} of its format, known is {PLAIN_VERSION}",
            where=f"{folder}/{MANIFEST}",
            fix="pip install --upgrade ds-core ds-ckpt",
        )
    if not is_plain(manifest) or version != PLAIN_VERSION:
        raise top.wrong(f"version {PLAIN_VERSION} of {PLAIN_FORMAT}")
    world_size = top["world_size"].whole(1, 2**24)
    files = {name: StoredFile(name, field.whole(), None) for name, field in top["files"].items()}
    found: dict[Key, tuple[LogicalTensor, list[StoredChunk]]] = {}
    rank_states = tuple(_read_file(file, folder, world_size, found) for file in files.values())
    if len(rank_states) != world_size:
        raise top["files"].wrong(f"a file of each of {world_size} ranks")
    tensors = {key: StoredTensor(of, tuple(chunks)) for key, (of, chunks) in found.items()}
    check_chunks(tensors.values(), {name: file.nbytes for name, file in files.items()}, folder, None)
    state = top["state"].object()
    return Stored(folder, PLAIN_FORMAT, str(version), world_size, tensors, files, state, rank_states)


def _read_file(
    file: StoredFile, folder: Folder, world_size: int, found: dict[Key, tuple[LogicalTensor, list[StoredChunk]]]
) -> Mapping[str, Any]:
    """Add the chunks of a file to ``found``, and return the state of the rank that wrote it."""
    header, start = _read_header(file, folder)
    metadata = header["__metadata__"]
    tables = {
        key: Field(
            parse_json(metadata[key].text(MAX_HEADER_BYTES).encode(), folder, file.name, key),
            key,
            folder,
            file.name,
        )
        for key in ("pieces", "rank_state")
    }
    for row in tables["pieces"].list():
        of, stored = _read_row(row, header, start, file.name, world_size)
        known, chunks = found.setdefault((of.name, of.kind, of.rank), (of, []))
        if known != of:
            raise row.wrong(f"{known.kind} {known.name!r} as in another row, {list(known.shape)} of {known.dtype}")
        chunks.append(stored)
    return tables["rank_state"].object()


def _read_header(file: StoredFile, folder: Folder) -> tuple[Field, int]:
    """Return the header of a safetensors file, and where its tensors start."""
    opened = folder.open(file.name)
    if opened.nbytes != file.nbytes:
        raise damaged(f"a file of the checkpoint has {opened.nbytes} bytes instead of {file.nbytes}", folder, file.name)
    start = bytearray(8)
    opened.read_into(0, memoryview(start))
    nbytes = int.from_bytes(start, "little")
    if nbytes > min(file.nbytes - 8, MAX_HEADER_BYTES):
        raise damaged(f"a header of {nbytes} bytes in a file of {file.nbytes}", folder, file.name)
    data = bytearray(nbytes)
    opened.read_into(8, memoryview(data))
    return Field(parse_json(bytes(data), folder, file.name, "the header"), "", folder, file.name), 8 + nbytes


def _read_row(row: Field, header: Field, start: int, file: str, world_size: int) -> tuple[LogicalTensor, StoredChunk]:
    rank = row.get("rank")
    of = LogicalTensor(
        row["name"].text(),
        row["kind"].text(),
        row["shape"].shape(),
        row["dtype"].dtype(),
        None if rank is None else rank.whole(0, world_size - 1),
    )
    box, interval = row["box"].list(2), row["interval"].list(2)
    place = Field([*(field.value for field in (*box, *interval))], row.way, *row.origin)
    entry = header[row["key"].text(2 * 4096)]
    if _DTYPES.get(entry["dtype"].text()) != of.dtype:
        raise entry["dtype"].wrong(f"the word of {of.dtype}")
    begin, end = entry["data_offsets"].list(2)
    chunk = place.chunk(of.shape)
    nbytes = chunk.length * ITEM_BYTES[of.dtype]
    if end.whole() - begin.whole() != nbytes:
        raise entry["data_offsets"].wrong(f"{nbytes} bytes")
    return of, StoredChunk(chunk, file, start + begin.whole(), nbytes)
