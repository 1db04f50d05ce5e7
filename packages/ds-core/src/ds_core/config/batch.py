"""Batch arithmetic: train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING

from ds_core.config.number_types import as_whole
from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["BatchSizes", "resolve_batch"]

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
SEARCHED = 10_000
LARGEST = 2**63 - 1


@dataclass(frozen=True)
class BatchSizes:
    """Sizes in samples that obey ``train == micro * accumulation * dp_world_size``."""

    train: int
    """Samples of one optimizer step, over all ranks."""
    micro: int
    """Samples of one forward on one rank."""
    accumulation: int
    """Forwards per optimizer step."""
    dp_world_size: int
    """Data-parallel ranks."""


def resolve_batch(
    train: float | None, micro: float | None, accumulation: float | None, dp_world_size: float
) -> BatchSizes:
    """Return all three sizes from those given; None means "not given".

    Args:
        train: ``train_batch_size``.
        micro: ``train_micro_batch_size_per_gpu``.
        accumulation: ``gradient_accumulation_steps``; 1 where only one of the others is given.
        dp_world_size: data-parallel ranks.

    Raises:
        ConfigError: a size is not a whole number from 1, the sizes contradict each other, or too few are given.

    >>> resolve_batch(24, 3, None, 2)
    BatchSizes(train=24, micro=3, accumulation=4, dp_world_size=2)
    """
    world = _whole("data-parallel ranks", dp_world_size)
    given_train = None if train is None else _whole(TRAIN, train)
    given_micro = None if micro is None else _whole(MICRO, micro)
    steps = None if accumulation is None else _whole(ACCUMULATION, accumulation)
    if given_train is None:
        if given_micro is None:
            raise ConfigError(
                f"{TRAIN}: is missing, and so is {MICRO}",
                fix=f'give one of them, such as "{MICRO}": 1',
            )
        steps = steps or 1
        return BatchSizes(given_micro * steps * world, given_micro, steps, world)
    known = (given_micro or 1) * (steps or 1) * world
    if given_micro is not None and steps is not None:
        if given_train != known:
            raise _conflict(given_train, given_micro, steps, world)
    elif given_train % known:
        raise _indivisible(given_train, given_micro, steps, world)
    quotient = given_train // known
    if given_micro is None:
        return BatchSizes(given_train, quotient, steps or 1, world)
    return BatchSizes(given_train, given_micro, steps or quotient, world)


def _whole(name: str, value: float) -> int:
    number = as_whole(value)
    if number is None or number < 1:
        raise ConfigError(f"{name}: got {value!r}, must be a whole number from 1", fix="give 1 or more")
    if number > LARGEST:  # also keeps the products of an error short enough to print
        raise ConfigError(f"{name}: is more than {LARGEST}", fix="give less")
    return number


def _indivisible(train: int, micro: int | None, accumulation: int | None, world: int) -> ConfigError:
    """Return the error of a batch that the given one of the other two sizes, or none, and the ranks do not divide."""
    size = micro or accumulation or 1
    below = train - train % (size * world)
    fixes = [f"set {TRAIN} to {' or '.join(str(near) for near in (below, below + size * world) if near)}"]
    if micro is not None and train % world == 0:
        # Less memory rather than more, and more steps rather than larger micro-batches.
        fixes += [f"set {MICRO} to {fit}" for fit in _divisor(train // world, range(micro - 1, 0, -1))]
    if accumulation is not None and train % world == 0:
        fixes += [f"set {ACCUMULATION} to {fit}" for fit in _divisor(train // world, count(accumulation + 1))]
    if train % size == 0:
        fixes += [f"run on {fit} ranks" for fit in _divisor(train // size, range(world - 1, 1, -1))]
    # Accumulation that is not given is 1, unless the other two decide it.
    steps = accumulation or ("?" if micro else 1)
    return ConfigError(
        f"{TRAIN}: {train} cannot be {MICRO} x {ACCUMULATION} x ranks = {micro or '?'} x {steps} x {world},"
        f" a multiple of {size * world}",
        fix=", or ".join(fixes),
    )


def _divisor(number: int, candidates: Iterable[int]) -> list[int]:
    """Return the first of ``candidates`` that divides ``number``, if it is among the nearest ten thousand."""
    return [size for size in islice(candidates, SEARCHED) if number % size == 0][:1]


def _conflict(train: int, micro: int, accumulation: int, world: int) -> ConfigError:
    product = micro * accumulation * world
    fixes = [f"set {TRAIN} to {product}"]
    for name, others in ((MICRO, accumulation * world), (ACCUMULATION, micro * world)):
        if train % others == 0:
            fixes.append(f"set {name} to {train // others}")
    if train % (micro * accumulation) == 0:
        ranks = train // (micro * accumulation)
        fixes.append(f"run on {ranks} rank{'s' if ranks > 1 else ''}")
    return ConfigError(
        f"{TRAIN}: {train} is not {MICRO} x {ACCUMULATION} x ranks = {micro} x {accumulation} x {world} = {product}",
        fix=", or ".join([*fixes, f"leave out {TRAIN}"]),
    )
