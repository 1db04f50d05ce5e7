"""The batch arithmetic: every combination of given sizes, by property."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_core.config import BatchSizes, ConfigError, resolve_batch

SIZES = st.integers(1, 64)


@given(SIZES, SIZES, SIZES)
def test_whatever_is_left_out_is_found_again(micro: int, accumulation: int, world: int) -> None:
    train = micro * accumulation * world
    whole = BatchSizes(train, micro, accumulation, world)
    assert resolve_batch(train, micro, accumulation, world) == whole
    assert resolve_batch(train, micro, None, world) == whole
    assert resolve_batch(train, None, accumulation, world) == whole
    assert resolve_batch(None, micro, accumulation, world) == whole


@given(SIZES, SIZES)
def test_one_size_alone_means_one_forward_per_step(micro: int, world: int) -> None:
    whole = BatchSizes(micro * world, micro, 1, world)
    assert resolve_batch(micro * world, None, None, world) == whole
    assert resolve_batch(None, micro, None, world) == whole


OPTIONAL = st.none() | st.integers(1, 48)


@given(OPTIONAL, OPTIONAL, OPTIONAL, st.integers(1, 8))
def test_the_result_keeps_what_was_given_or_there_is_none(
    train: int | None, micro: int | None, accumulation: int | None, world: int
) -> None:
    given_sizes = (train, micro, accumulation)
    possible = [
        BatchSizes(m * a * world, m, a, world)
        for m in ([micro] if micro else range(1, 49))
        # Accumulation is 1 unless it is given or follows from the other two.
        for a in ([accumulation] if accumulation else range(1, 49) if train and micro else [1])
        if train in (None, m * a * world)
    ]
    if train is None and micro is None:
        possible = []
    try:
        sizes = resolve_batch(*given_sizes, world)
    except ConfigError:
        assert possible == []
    else:
        assert possible == [sizes]


@given(SIZES, SIZES, SIZES, SIZES)
def test_every_fix_of_a_contradiction_is_one(train: int, micro: int, accumulation: int, world: int) -> None:
    if train == micro * accumulation * world:
        return
    with pytest.raises(ConfigError) as caught:
        resolve_batch(train, micro, accumulation, world)
    assert f"{micro} x {accumulation} x {world} = {micro * accumulation * world}" in caught.value.what
    assert caught.value.fix is not None
    for fix in caught.value.fix.split(", or "):
        words = fix.split()
        if words[0] == "set":
            arguments = {
                "train_batch_size": train,
                "train_micro_batch_size_per_gpu": micro,
                "gradient_accumulation_steps": accumulation,
            } | {words[1]: int(words[3])}
            resolve_batch(*arguments.values(), world)
        elif words[0] == "run":
            resolve_batch(train, micro, accumulation, int(words[2]))


@given(SIZES, st.integers(2, 64))
def test_the_multiples_named_are_the_neighbours(train: int, world: int) -> None:
    if train % world == 0:
        return
    with pytest.raises(ConfigError, match=f"must be a multiple of the number of ranks, {world}") as caught:
        resolve_batch(train, None, None, world)
    below = train // world * world
    expected = f"{below} or {below + world}" if below else f"{world}"
    assert caught.value.fix == f"set train_batch_size to {expected}, or change what it is divided by"


def test_integral_floats_are_sizes() -> None:
    assert resolve_batch(8.0, 2.0, None, 2.0) == BatchSizes(8, 2, 2, 2)


@pytest.mark.parametrize("size", [0, -1, 1.5, float("inf"), float("nan"), True])
def test_not_a_size(size: float) -> None:
    for arguments in ((size, None, None, 1), (None, size, None, 1), (4, None, size, 1), (4, None, None, size)):
        with pytest.raises(ConfigError, match="must be a whole number from 1"):
            resolve_batch(*arguments)
