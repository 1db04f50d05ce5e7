"""The batch arithmetic: every combination of given and absent sizes, against an oracle that only counts."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ds_core.config import BatchSizes, ConfigError, resolve_batch

# The deadline of hypothesis would measure the machine.
anywhere = settings(deadline=None)
TRAIN, MICRO, ACCUMULATION = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
KEYS = (TRAIN, MICRO, ACCUMULATION)
SIZES = st.integers(1, 64)
ABSENT_OR_SMALL = st.none() | st.integers(1, 48)
WORLDS = st.integers(1, 12)


def oracle(train: int | None, micro: int | None, accumulation: int | None, world: int) -> set[tuple[int, int, int]]:
    """Return the sizes that the table of the specification leads to, found by trying all: at most one triple.

    ========== ===================================
    given      filled in
    ========== ===================================
    B, m, g    nothing
    B, m       g
    B, g       m
    m, g       B
    B          g = 1, m
    m          g = 1, B
    g, nothing an error: B or m is needed
    ========== ===================================
    """
    if train is None and micro is None:
        return set()
    most = train or 48 * 48 * world
    steps = {accumulation} if accumulation else range(1, most + 1) if train and micro else {1}
    micros = {micro} if micro else range(1, most + 1)
    return {(m * g * world, m, g) for m in micros for g in steps if train in (None, m * g * world)}


def applied(fix: str, sizes: dict[str, int | None], world: int) -> list[tuple[dict[str, int | None], int]]:
    """Return ``sizes`` and ``world`` once for every way to fix them that ``fix`` proposes; each part must be one."""
    found = []
    for part in fix.split(", or "):
        if match := re.fullmatch(rf"set ({'|'.join(KEYS)}) to (\d+)(?: or (\d+))?", part):
            found += [({**sizes, match[1]: int(value)}, world) for value in match.groups()[1:] if value]
        elif match := re.fullmatch(r"run on (\d+) ranks?", part):
            found.append((sizes, int(match[1])))
        elif match := re.fullmatch(rf"leave out ({'|'.join(KEYS)})", part):
            found.append(({**sizes, match[1]: None}, world))
        elif match := re.fullmatch(rf'give one of them, such as "({MICRO})": (\d+)', part):
            found.append(({**sizes, match[1]: int(match[2])}, world))
        else:
            raise AssertionError(f"not a fix that can be applied: {part!r}")
    return found


@anywhere
@given(ABSENT_OR_SMALL, ABSENT_OR_SMALL, ABSENT_OR_SMALL, WORLDS)
@example(1, 2, None, 1)  # DeepSpeed complains about an accumulation of 0
@example(None, None, 3, 2)
@example(24, 5, None, 2)
@example(24, None, 5, 2)
@example(24, 3, 2, 2)
@example(7, None, None, 2)
def test_the_sizes_are_the_only_ones_possible_or_every_fix_of_the_error_is_one(
    train: int | None, micro: int | None, accumulation: int | None, world: int
) -> None:
    possible = oracle(train, micro, accumulation, world)
    try:
        found = resolve_batch(train, micro, accumulation, world)
    except ConfigError as error:
        assert possible == set()
        assert_names_the_culprit(error, (train, micro, accumulation), world)
        fixes = applied(str(error.fix), dict(zip(KEYS, (train, micro, accumulation), strict=True)), world)
        assert fixes
        for sizes, ranks in fixes:
            fixed = resolve_batch(*sizes.values(), ranks)
            assert {(fixed.train, fixed.micro, fixed.accumulation)} == oracle(*sizes.values(), ranks)
    else:
        assert possible == {(found.train, found.micro, found.accumulation)}
        assert found.dp_world_size == world
        assert all(type(size) is int for size in (found.train, found.micro, found.accumulation))


def assert_names_the_culprit(error: ConfigError, sizes: tuple[int | None, ...], world: int) -> None:
    train, micro, accumulation = sizes
    if train is None:
        assert error.what == f"{TRAIN}: is missing, and so is {MICRO}"
        return
    path, _, text = error.what.partition(": ")
    assert path == TRAIN
    steps = accumulation or ("?" if micro else 1)
    assert text.startswith(f"{train} ")
    assert f"{MICRO} x {ACCUMULATION} x ranks = {micro or '?'} x {steps} x {world}" in text
    total = (micro or 1) * (accumulation or 1) * world
    assert text.endswith(f" = {total}" if micro and accumulation else f", a multiple of {total}")


@anywhere
@given(SIZES, SIZES, SIZES)
def test_whatever_is_left_out_is_found_again(micro: int, accumulation: int, world: int) -> None:
    train = micro * accumulation * world
    whole = BatchSizes(train, micro, accumulation, world)
    assert resolve_batch(train, micro, accumulation, world) == whole
    assert resolve_batch(train, micro, None, world) == whole
    assert resolve_batch(train, None, accumulation, world) == whole
    assert resolve_batch(None, micro, accumulation, world) == whole


@anywhere
@given(SIZES, SIZES)
def test_one_size_alone_means_one_forward_per_step(micro: int, world: int) -> None:
    whole = BatchSizes(micro * world, micro, 1, world)
    assert resolve_batch(micro * world, None, None, world) == whole
    assert resolve_batch(None, micro, None, world) == whole


@anywhere
@given(SIZES, st.integers(2, 64))
def test_the_multiples_named_are_the_neighbours(train: int, world: int) -> None:
    if train % world == 0:
        return
    with pytest.raises(ConfigError, match=f", a multiple of {world}\n") as caught:
        resolve_batch(train, None, None, world)
    below = train // world * world
    expected = f"{below} or {below + world}" if below else f"{world}"
    assert str(caught.value.fix).split(", or ")[0] == f"set train_batch_size to {expected}"


@pytest.mark.parametrize(
    ("sizes", "world", "fixes"),
    [
        # Of smaller micro-batches the largest, of longer accumulations the shortest, of fewer ranks the most.
        ((24, 5, None), 2, [f"set {TRAIN} to 20 or 30", f"set {MICRO} to 4"]),
        ((24, None, 5), 2, [f"set {TRAIN} to 20 or 30", f"set {ACCUMULATION} to 6"]),
        ((12, None, None), 8, [f"set {TRAIN} to 8 or 16", "run on 6 ranks"]),
        ((12, 2, None), 4, [f"set {TRAIN} to 8 or 16", f"set {MICRO} to 1", "run on 3 ranks"]),
        # One rank is no advice.
        ((7, None, None), 2, [f"set {TRAIN} to 6 or 8"]),
        (
            (24, 3, 2),
            2,
            [
                f"set {TRAIN} to 12",
                f"set {MICRO} to 6",
                f"set {ACCUMULATION} to 4",
                "run on 4 ranks",
                f"leave out {TRAIN}",
            ],
        ),
    ],
)
def test_the_fixes_are_the_nearest_ones(sizes: tuple[int | None, ...], world: int, fixes: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_batch(*sizes, world)
    assert caught.value.fix == ", or ".join(fixes)


def test_a_fix_that_is_far_away_is_not_searched_for() -> None:
    prime = 2**61 - 1
    with pytest.raises(ConfigError) as caught:
        resolve_batch(prime, 2**40, None, 1)
    below = prime - prime % 2**40
    assert caught.value.fix == f"set train_batch_size to {below} or {below + 2**40}"


def test_integral_floats_are_sizes() -> None:
    assert resolve_batch(8.0, 2.0, None, 2.0) == BatchSizes(8, 2, 2, 2)


@pytest.mark.parametrize("size", [0, -1, 1.5, float("inf"), float("nan"), True])
@pytest.mark.parametrize("place", range(4))
def test_not_a_size(size: float, place: int) -> None:
    arguments = [4, 2, 2, 1]
    arguments[place] = size  # type: ignore[call-overload]
    name = [*KEYS, "data-parallel ranks"][place]
    with pytest.raises(ConfigError, match=re.escape(f"{name}: got {size!r}, must be a whole number from 1")):
        resolve_batch(*arguments)


@pytest.mark.parametrize("size", [2**63, 10**4000, 1e300])
def test_a_size_no_tensor_can_have(size: float) -> None:
    # Also: a number of five thousand digits cannot even be printed, and the products in an error are longer than it.
    with pytest.raises(ConfigError, match=f"{MICRO}: is more than 9223372036854775807"):
        resolve_batch(3, size, 2, 7)
