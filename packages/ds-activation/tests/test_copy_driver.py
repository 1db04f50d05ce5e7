"""Host buffers that are lent: the smallest that fits, and never more of them than were lent at one time."""

from __future__ import annotations

import pytest
import torch

from ds_activation.copy_driver import Driver, Pool

CPU = torch.device("cpu")


@pytest.fixture
def made() -> list[int]:
    return []


@pytest.fixture
def pool(made: list[int]) -> Pool:
    def make(nbytes: int) -> torch.Tensor:
        made.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    return Pool(make, max_free=3)


def test_the_smallest_that_fits_is_lent_again(pool: Pool) -> None:
    buffers = {nbytes: pool.take(nbytes) for nbytes in (30, 10, 20)}
    for buffer in buffers.values():
        pool.give_back(buffer)
    assert pool.take(15) is buffers[20]
    assert pool.take(20) is buffers[30]
    assert pool.take(1) is buffers[10]


def test_one_that_is_too_small_goes_for_a_larger_one(pool: Pool, made: list[int]) -> None:
    pool.give_back(pool.take(10))
    large = pool.take(20)
    pool.give_back(large)
    assert [pool.take(5) is large for _ in range(2)] == [True, False]
    assert made == [10, 20, 5]


def test_of_too_many_the_smallest_goes(pool: Pool, made: list[int]) -> None:
    for buffer in [pool.take(nbytes) for nbytes in (30, 10, 20, 40)]:
        pool.give_back(buffer)
    assert [pool.take(1).numel() for _ in range(3)] == [20, 30, 40]
    assert made == [30, 10, 20, 40]


def test_without_a_stream_a_copy_is_done_when_it_returns() -> None:
    driver, given = Driver(), torch.arange(6.0).view(2, 3).t()
    target = driver.device_memory(
        driver.host_memory(24, pinned=False).view(torch.float32).as_strided((3, 2), (1, 3)), CPU
    )
    driver.copy(target, given, None)
    assert torch.equal(target, given)
    assert target.stride() == (1, 3)


def test_the_host_is_no_device() -> None:
    assert [Driver().is_on_device(torch.empty(1, device=name)) for name in ("cpu", "meta")] == [False, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_of_a_real_device() -> None:
    driver, device = Driver(), torch.device("cuda", 0)
    assert driver.has_streams(device)
    side, current = driver.new_stream(device), driver.current_stream(device)
    given = torch.arange(1000.0, device=device)
    assert driver.is_on_device(given)
    buffer = driver.host_memory(4000, pinned=True).view(torch.float32)
    assert buffer.is_pinned()
    driver.wait(side, driver.record(current))
    driver.copy(buffer, given, side)
    back = driver.device_memory(buffer, device)
    driver.wait(side, driver.record(current))
    driver.copy(back, buffer, side)
    done = driver.record(side)
    driver.wait(current, done)
    driver.use_on(back, current)
    assert torch.equal(back, given)
    torch.cuda.synchronize()
    assert driver.has_passed(done)
