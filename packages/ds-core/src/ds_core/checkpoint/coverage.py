"""Whether chunks hold every element of a tensor once: all that was written, nothing twice. Loads no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ds_core.interfaces.logical import Box, Chunk

__all__ = ["not_once"]

MAX_COMPARISONS = 10**6
"""How often boxes of one tensor are compared with each other; a real checkpoint needs a few per box."""


def not_once(shape: tuple[int, ...], chunks: Sequence[Chunk]) -> str | None:
    """Return why ``chunks`` do not hold every element of a tensor of ``shape`` once, or None where they do.

    Args:
        shape: of the tensor.
        chunks: their boxes lie inside it, and their intervals inside the boxes.
    """
    numel, held = math.prod(shape), sum(chunk.length for chunk in chunks)
    if not chunks:
        return "it has no chunk"
    if held != numel:
        return f"its chunks hold {held} of {numel} elements"
    # As many elements as there are, so that they are all there exactly if no two chunks share one. In the order of
    # their first element, a box need only be compared with those that are not over by then.
    spans = [] if len(chunks) == 1 else [_ends(span.box, shape) for chunk in chunks for span in chunk.spans()]
    spans.sort(key=lambda span: span[:2])
    comparisons = 0
    active: list[tuple[int, Box]] = []
    for first, last, box in spans:
        active = [(end, other) for end, other in active if end >= first]
        comparisons += len(active)
        if comparisons > MAX_COMPARISONS:
            return f"its {len(chunks)} chunks are interleaved in too many ways to be checked"
        if any(_meet(box, other) for _, other in active):
            return "its chunks overlap"
        active.append((last, box))
    return None


def _ends(box: Box, shape: Sequence[int]) -> tuple[int, int, Box]:
    """Return where the first and the last element of ``box`` are in the tensor, and the box."""
    return _flat(box.start, shape), _flat([a + n - 1 for a, n in zip(box.start, box.size, strict=True)], shape), box


def _flat(index: Sequence[int], shape: Sequence[int]) -> int:
    at = 0
    for place, size in zip(index, shape, strict=True):
        at = at * size + place
    return at


def _meet(a: Box, b: Box) -> bool:
    return all(max(s, t) < min(s + n, t + m) for s, n, t, m in zip(a.start, a.size, b.start, b.size, strict=True))
