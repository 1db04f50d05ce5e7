"""Plans of buckets and writers: pure functions, shown by properties."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_core.partition.arithmetic import assign_writers, plan_buckets

items = st.lists(st.tuples(st.integers(0, 50), st.sampled_from(["fp32", "bf16", "fp64"])), max_size=40)
limits = st.integers(1, 120)


def plan(of: list[tuple[int, str]], bucket_bytes: int, first_bytes: int) -> list[list[int]]:
    return plan_buckets([size for size, _ in of], [kind for _, kind in of], bucket_bytes, first_bytes)


@given(items, limits, limits)
def test_each_item_is_in_one_bucket_once(of, bucket_bytes, first_bytes):
    buckets = plan(of, bucket_bytes, first_bytes)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(len(of)))
    assert all(buckets)


@given(items, limits, limits)
def test_kinds_are_never_mixed(of, bucket_bytes, first_bytes):
    for bucket in plan(of, bucket_bytes, first_bytes):
        assert len({of[index][1] for index in bucket}) == 1


@given(items, limits, limits)
def test_items_of_a_kind_keep_their_order(of, bucket_bytes, first_bytes):
    buckets = plan(of, bucket_bytes, first_bytes)
    for kind in {kind for _, kind in of}:
        order = [index for bucket in buckets for index in bucket if of[index][1] == kind]
        assert order == sorted(order)


@given(items, limits, limits)
def test_a_bucket_is_closed_by_the_item_that_fills_it(of, bucket_bytes, first_bytes):
    buckets = plan(of, bucket_bytes, first_bytes)
    for kind in {kind for _, kind in of}:
        mine = [bucket for bucket in buckets if of[bucket[0]][1] == kind]
        for place, bucket in enumerate(mine):
            limit = bucket_bytes if place else first_bytes
            sizes = [of[index][0] for index in bucket]
            assert sum(sizes[:-1]) < limit, "it was full before its last item"
            assert sum(sizes) >= limit or place == len(mine) - 1, "only the last of a kind may be left open"


@given(items, limits, limits)
def test_full_buckets_come_in_the_order_in_which_they_are_full(of, bucket_bytes, first_bytes):
    buckets = plan(of, bucket_bytes, first_bytes)
    seen: set[str] = set()
    full = []
    for bucket in buckets:
        kind = of[bucket[0]][1]
        limit = bucket_bytes if kind in seen else first_bytes
        seen.add(kind)
        full.append(sum(of[index][0] for index in bucket) >= limit)
    assert full == sorted(full, reverse=True), "those left open come last"
    last = [bucket[-1] for bucket, is_full in zip(buckets, full, strict=True) if is_full]
    assert last == sorted(last)


def test_buckets_of_one_kind_by_hand():
    assert plan_buckets([4, 4, 4, 4, 4], ["a"] * 5, bucket_bytes=8, first_bytes=4) == [[0], [1, 2], [3, 4]]
    assert plan_buckets([4, 4, 4, 4], ["a"] * 4, bucket_bytes=8, first_bytes=4) == [[0], [1, 2], [3]]
    assert plan_buckets([100, 0, 0, 1], ["a"] * 4, bucket_bytes=8, first_bytes=1) == [[0], [1, 2, 3]]


def test_buckets_of_several_kinds_by_hand():
    assert plan_buckets([4, 4, 4, 4], ["a", "b", "a", "b"], bucket_bytes=8, first_bytes=8) == [[0, 2], [1, 3]]
    assert plan_buckets([4, 9, 4], ["a", "b", "a"], bucket_bytes=100, first_bytes=9) == [[1], [0, 2]]


def test_nothing_makes_no_bucket():
    assert plan_buckets([], [], 1, 1) == []


def test_sizes_and_kinds_must_belong_together():
    with pytest.raises(ValueError, match="zip"):
        plan_buckets([1, 2], ["a"], 1, 1)


sizes = st.lists(st.integers(0, 1000), max_size=40)
worlds = st.integers(1, 9)


@given(sizes, worlds)
def test_each_item_has_one_writer(of, world_size):
    writers = assign_writers(of, world_size)
    assert len(writers) == len(of)
    assert all(0 <= writer < world_size for writer in writers)


@given(sizes, worlds)
def test_no_rank_has_more_than_its_share_and_one_item(of, world_size):
    load = [0] * world_size
    for size, writer in zip(of, assign_writers(of, world_size), strict=True):
        load[writer] += size
    # Graham 1966: an item goes to the rank with the least, which has at most the mean of the others.
    assert max(load) * world_size <= sum(of) + (world_size - 1) * max(of, default=0)


@given(st.lists(st.integers(1, 30), max_size=8), st.integers(1, 3))
def test_the_largest_load_is_within_grahams_bound_of_the_best(of, world_size):
    # 4/3 - 1/(3 m), against the best found by trying everything.
    load = [0] * world_size
    for size, writer in zip(of, assign_writers(of, world_size), strict=True):
        load[writer] += size
    best = best_load(tuple(of), world_size)
    assert 3 * world_size * max(load) <= (4 * world_size - 1) * best


def best_load(of: tuple[int, ...], world_size: int) -> int:
    """Return the smallest possible largest load, trying everything."""
    loads = {(0,) * world_size}
    for size in of:
        loads = {
            tuple(sorted((*load[:rank], load[rank] + size, *load[rank + 1 :])))
            for load in loads
            for rank in range(world_size)
        }
    return min(max(load) for load in loads)


@given(sizes, worlds)
def test_ranks_agree_without_talking(of, world_size):
    assert assign_writers(list(of), world_size) == assign_writers(tuple(of), world_size)


def test_equal_items_are_dealt_in_turn():
    assert assign_writers([5] * 7, 3) == [0, 1, 2, 0, 1, 2, 0]
    assert assign_writers([1, 9, 1, 9], 2) == [0, 0, 1, 1]
    assert assign_writers([0, 0, 0], 2) == [0, 0, 0]
    assert assign_writers([], 4) == []


def test_it_needs_no_torch():
    code = "import sys, ds_core.partition.arithmetic; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
