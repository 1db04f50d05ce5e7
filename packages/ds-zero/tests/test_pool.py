"""Memory that is lent: the smallest that fits, and never more of it than was lent at one time."""

from __future__ import annotations

import torch

from ds_zero.pool import Pool

CPU = torch.device("cpu")


def test_the_smallest_that_fits_is_lent_again() -> None:
    pool = Pool()
    rooms = {numel: pool.take(numel, torch.float32, CPU) for numel in (30, 10, 20)}
    for room in rooms.values():
        pool.give_back(room)
    assert pool.take(15, torch.float32, CPU) is rooms[20]
    assert pool.take(20, torch.float32, CPU) is rooms[30]
    assert pool.take(0, torch.float32, CPU) is rooms[10]


def test_one_that_is_too_small_goes_for_a_larger_one() -> None:
    pool = Pool()
    pool.give_back(pool.take(10, torch.float32, CPU))
    large = pool.take(20, torch.float32, CPU)
    assert large.shape == (20,)
    pool.give_back(large)
    assert [pool.take(5, torch.float32, CPU) is large for _ in range(2)] == [True, False]


def test_dtypes_are_apart() -> None:
    pool = Pool()
    room = pool.take(10, torch.float32, CPU)
    pool.give_back(room)
    assert pool.take(10, torch.bfloat16, CPU).dtype == torch.bfloat16
    assert pool.take(10, torch.float32, CPU) is room


def test_what_was_cleared_is_gone() -> None:
    pool = Pool()
    room = pool.take(10, torch.float32, CPU)
    pool.give_back(room)
    pool.clear()
    assert pool.take(10, torch.float32, CPU) is not room
