"""How what a rank writes is cut into chunks and shared out to files. Arithmetic only; loads no torch."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from ds_ckpt.checks import ITEM_BYTES
from ds_core.interfaces.logical import Chunk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ds_core.interfaces.logical import Piece

__all__ = ["Part", "share_out"]

_SMALLEST_CUT_BYTES = 2**20
"""Pieces are not cut finer than this for the sake of files of one size."""
_CUTS_PER_FILE = 8


class Part(NamedTuple):
    """A chunk that is written as one: all of a piece, or an interval of it."""

    piece: Piece
    chunk: Chunk

    @property
    def nbytes(self) -> int:
        return self.chunk.length * ITEM_BYTES[self.piece.of.dtype]


def share_out(pieces: Sequence[Piece], *, writers: int, chunk_bytes: int) -> list[list[Part]]:
    """Cut ``pieces`` into parts of at most ``chunk_bytes``, and share them out to files of about one size.

    Args:
        pieces: what this rank writes.
        writers: most files that are wanted.
        chunk_bytes: most bytes of a part; a part has one element at least.

    Returns:
        The parts of each file, none of them empty; in a file wide dtypes come first, so that each starts at a multiple
        of its item size. No file where there are no pieces.
    """
    total = sum(piece.chunk.length * ITEM_BYTES[piece.of.dtype] for piece in pieces)
    files = min(writers, max(1, -(-total // chunk_bytes)))
    limit = min(chunk_bytes, max(_SMALLEST_CUT_BYTES, total // (_CUTS_PER_FILE * files)))
    parts = [part for piece in pieces for part in _cut(piece, limit)]
    shares: list[list[Part]] = [[] for _ in range(files)]
    filled = [0] * files
    # Largest first, each to the file that has least: within a third of the best there is (Graham, 1969).
    for part in sorted(parts, key=lambda part: -part.nbytes):
        least = filled.index(min(filled))
        shares[least].append(part)
        filled[least] += part.nbytes
    return [sorted(share, key=lambda part: -ITEM_BYTES[part.piece.of.dtype]) for share in shares if share]


def _cut(piece: Piece, limit_bytes: int) -> list[Part]:
    chunk = piece.chunk
    at_most = max(1, limit_bytes // ITEM_BYTES[piece.of.dtype])
    count = max(1, -(-chunk.length // at_most))
    edges = [chunk.length * part // count for part in range(count + 1)]
    return [Part(piece, Chunk(chunk.box, chunk.offset + low, high - low)) for low, high in itertools.pairwise(edges)]
