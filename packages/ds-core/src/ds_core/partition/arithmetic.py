"""Pure arithmetic of partitions: which parameters share a bucket, which rank writes what. Runs on a CPU, no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    Kind = TypeVar("Kind", bound=Hashable)

__all__ = ["assign_writers", "plan_buckets"]


def plan_buckets(sizes: Sequence[int], kinds: Sequence[Kind], bucket_bytes: int, first_bytes: int) -> list[list[int]]:
    """Cut items into buckets of consecutive items of one kind.

    A bucket is closed when it has reached its size, so it may exceed it by its last item; an item is never cut.

    Args:
        sizes: bytes of each item, in the order their gradients are expected.
        kinds: items in one bucket have equal kinds (dtype and device).
        bucket_bytes: size of a bucket.
        first_bytes: size of the first bucket of each kind: a small one starts communicating sooner.

    Returns:
        Indices of the items of each bucket; buckets in the order in which they are full.
    """
    done: list[list[int]] = []
    open_: dict[Kind, tuple[list[int], int]] = {}
    started: set[Kind] = set()
    for index, (size, kind) in enumerate(zip(sizes, kinds, strict=True)):
        items, total = open_.pop(kind, ([], 0))
        items.append(index)
        total += size
        if total >= (bucket_bytes if kind in started else first_bytes):
            done.append(items)
            started.add(kind)
        else:
            open_[kind] = (items, total)
    done.extend(items for items, _ in open_.values())
    return done


def assign_writers(sizes: Sequence[int], world_size: int) -> list[int]:
    """Give each item that every rank holds to one rank, so that ranks write about equally much.

    Largest first, each to the rank with the least so far, ties to the lowest rank: within 4/3 of the best possible
    (Graham 1969, "Bounds on multiprocessing timing anomalies"). Deterministic, so all ranks agree without talking.
    """
    load = [0] * world_size
    writers = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = min(range(world_size), key=lambda r: (load[r], r))
        writers[index] = rank
        load[rank] += sizes[index]
    return writers
