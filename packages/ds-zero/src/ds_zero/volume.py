"""What an optimizer step moves between the ranks, predicted from sizes alone.

Bytes are payload, as :class:`ds_core.comm.Traffic` counts them: what a collective reads and writes on one rank. Every
rank of a step moves the same.

Note: what a step of stages 1 and 2 is, for each bucket: a reduce-scatter of its gradients in the dtype they are reduced
in, once a window at stage 1, in every backward at stage 2; and an all-gather of its weights as they are stored, if the
step updates. Besides, once a window, one all-reduce of a flag (4 bytes) per parameter, at stage 2 one number per rank,
and where sources of an overflow are asked for one flag per bucket and rank; and one of the squared norm. Stage 0 is ds-
core's: one all-reduce per bucket and window, with the flags behind the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_core.comm import Traffic
from ds_zero.collectives import SEGMENTS, primitives

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ds_zero.layout import Layout

__all__ = ["BucketSizes", "step_traffic", "table"]

FLAG_BYTES = 4
NORM_BYTES = 8
"""``sum_of_squares`` adds in fp64."""
FOUND_BYTES = 8
"""The number of the parameter in which an overflow was found."""


@dataclass(frozen=True)
class BucketSizes:
    """One bucket. At stage 0 it has neither segments nor padding; of its layout only the parameters count."""

    layout: Layout
    reduce_bytes: int
    """Of one element, as gradients are reduced."""
    stored_bytes: int
    """Of one element, as weights are stored."""


def step_traffic(
    buckets: Sequence[BucketSizes],
    *,
    stage: int,
    accumulation: int,
    backend: str,
    find_sources: bool = False,
    overflows: bool = False,
    updates: bool = True,
) -> dict[str, Traffic]:
    """Return what one rank of several moves in one optimizer step, by the name of the collective.

    >>> from ds_zero.layout import cut
    >>> weights = BucketSizes(cut([999_999], 2), reduce_bytes=2, stored_bytes=2)
    >>> moved = step_traffic([weights], stage=2, accumulation=4, backend="nccl")
    >>> moved["reduce_scatter_tensor"]
    Traffic(count=4, bytes_in=8000000, bytes_out=4000000)

    Args:
        buckets: in any order.
        stage: 0, 1 or 2.
        accumulation: backwards in the window.
        backend: as torch calls it.
        find_sources: the precision wants to know which rank had inf or NaN.
        overflows: the norm is not finite.
        updates: the step is not skipped.
    """
    if stage == 0:
        return _total(_all_reduce(bucket, find_sources=find_sources) for bucket in buckets)
    chosen = primitives(backend)
    backwards = accumulation if stage == 2 else 1
    found = []
    for bucket in buckets:
        segment, world_size = bucket.layout.segment, bucket.layout.world_size
        found += [_reduce_scatter(chosen.reduce_scatter, segment * bucket.reduce_bytes, world_size)] * backwards
        if updates:
            found.append(_all_gather(chosen.all_gather, segment * bucket.stored_bytes, world_size))
    flags = sum(len(bucket.layout.numels) for bucket in buckets)
    if stage == 2 and buckets:
        flags += buckets[0].layout.world_size
    if find_sources:
        flags += sum(bucket.layout.world_size for bucket in buckets)
    small = [flags * FLAG_BYTES] * bool(buckets) + [NORM_BYTES] + [FOUND_BYTES] * overflows
    return _total([*found, *({"all_reduce": Traffic(1, nbytes, nbytes)} for nbytes in small)])


def _all_reduce(bucket: BucketSizes, *, find_sources: bool) -> dict[str, Traffic]:
    numels = bucket.layout.numels
    sent = sum(numels) + len(numels) + bucket.layout.world_size * find_sources
    return {"all_reduce": Traffic(1, sent * bucket.reduce_bytes, sent * bucket.reduce_bytes)}


def _reduce_scatter(primitive: str, segment_bytes: int, world_size: int) -> dict[str, Traffic]:
    if primitive == SEGMENTS:
        return _segments(segment_bytes, world_size)
    return {primitive: Traffic(1, world_size * segment_bytes, segment_bytes)}


def _all_gather(primitive: str, segment_bytes: int, world_size: int) -> dict[str, Traffic]:
    if primitive == SEGMENTS:
        return _segments(segment_bytes, world_size)
    return {primitive: Traffic(1, segment_bytes, world_size * segment_bytes)}


def _segments(segment_bytes: int, world_size: int) -> dict[str, Traffic]:
    """Return the messages to and from each other rank; empty ones are not sent."""
    others = world_size - 1 if segment_bytes else 0
    nbytes = others * segment_bytes
    return {"send": Traffic(others, nbytes, 0), "recv": Traffic(others, 0, nbytes)}


def _total(found: Iterable[dict[str, Traffic]]) -> dict[str, Traffic]:
    total: dict[str, Traffic] = {}
    for each in found:
        for name, traffic in each.items():
            if traffic.count:
                total[name] = total.get(name, Traffic()) + traffic
    return total


def table(numel: int = 1_000_000, world_size: int = 4) -> str:
    """Return a table in Markdown of what ``numel`` parameters move in one step, the messages of a few bytes left out.

    >>> print(table(100, 2).splitlines()[2])
    | 1 | 1 | gloo | fp32 | 200 / 200 | 200 / 200 | 400 / 400 |
    """
    from ds_zero.layout import cut

    lines = [
        "| stage | accumulation | backend | dtype | gradients in / out | weights in / out | together |",
        "|---|---|---|---|---|---|---|",
    ]
    layout = cut([numel], world_size)
    for stage in (1, 2):
        for accumulation in (1, 4):
            for backend in ("gloo", "nccl"):
                for dtype, itemsize in (("fp32", 4), ("bf16", 2)):
                    sizes = [BucketSizes(layout, itemsize, itemsize)]
                    both, gradients = (
                        _large(step_traffic(sizes, stage=stage, accumulation=accumulation, backend=backend, updates=on))
                        for on in (True, False)
                    )
                    weights = Traffic(0, both.bytes_in - gradients.bytes_in, both.bytes_out - gradients.bytes_out)
                    cells = (f"{each.bytes_in} / {each.bytes_out}" for each in (gradients, weights, both))
                    lines.append(f"| {stage} | {accumulation} | {backend} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _large(moved: dict[str, Traffic]) -> Traffic:
    total = Traffic()
    for name, traffic in moved.items():
        if name != "all_reduce":
            total += traffic
    return total
