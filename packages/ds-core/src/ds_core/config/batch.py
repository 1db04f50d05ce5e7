"""Batch arithmetic: train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks."""

from __future__ import annotations

from dataclasses import dataclass

from ds_core.errors import ConfigError

__all__ = ["BatchSizes", "resolve_batch"]

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"


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
    if given_micro is None:
        # The spelling of the error follows what the user gave: without accumulation it is not part of the rule.
        divisor = world if steps is None else steps * world
        product = "ranks" if steps is None else f"{ACCUMULATION} x ranks = {steps} x {world}"
        return BatchSizes(given_train, _quotient(given_train, divisor, product), steps or 1, world)
    if steps is None:
        product = f"{MICRO} x ranks = {given_micro} x {world}"
        return BatchSizes(given_train, given_micro, _quotient(given_train, given_micro * world, product), world)
    if given_train != given_micro * steps * world:
        raise _conflict(given_train, given_micro, steps, world)
    return BatchSizes(given_train, given_micro, steps, world)


def _whole(name: str, value: float) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1 or value < 1:
        raise ConfigError(f"{name}: got {value!r}, must be a whole number from 1", fix="give 1 or more")
    return int(value)


def _quotient(train: int, divisor: int, product: str) -> int:
    quotient, rest = divmod(train, divisor)
    if rest:
        near = [size for size in (train - rest, train - rest + divisor) if size]
        what = f"{product} = {divisor}" if "=" in product else f"the number of {product}, {divisor}"
        raise ConfigError(
            f"{TRAIN}: got {train}, must be a multiple of {what}",
            fix=f"set {TRAIN} to {' or '.join(map(str, near))}, or change what it is divided by",
        )
    return quotient


def _conflict(train: int, micro: int, accumulation: int, world: int) -> ConfigError:
    product = micro * accumulation * world
    fixes = [f"set {TRAIN} to {product}"]
    for name, others in ((MICRO, accumulation * world), (ACCUMULATION, micro * world)):
        if train % others == 0:
            fixes.append(f"set {name} to {train // others}")
    if train % (micro * accumulation) == 0:
        fixes.append(f"run on {train // (micro * accumulation)} ranks")
    return ConfigError(
        f"{TRAIN}: {train} is not {MICRO} x {ACCUMULATION} x ranks = {micro} x {accumulation} x {world} = {product}",
        fix=f"{', or '.join(fixes)}, or leave one of the three out",
    )
