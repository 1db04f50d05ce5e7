"""Schedules that warm up: ``WarmupLR``, ``WarmupDecayLR``, ``WarmupCosineLR``.

All take t = ``last_batch_iteration``, the schedule's counter: -1 at first, k-1 after k steps. With
W = max(2, ``warmup_num_steps``) the warmup is, for 0 <= t < W,

    g(t) = ln(t+1) / ln(W)   (``warmup_type`` "log")      g(t) = t / W   ("linear")
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from ds_core.log import log_dist
from ds_core.schedules._base import GroupSchedule, choice, positive_int

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]

WARMUP_TYPES = ("log", "linear")
_SHORT_WARMUP = 10
"""Below this many steps, two updates at rate 0 are a fifth of the warmup or more: worth a word."""


class _Warmup(GroupSchedule):
    """The part of a warmup that all three share: W, its shape, and what follows it."""

    def __init__(self, optimizer: Any, warmup_num_steps: int, warmup_type: str, last_batch_iteration: int) -> None:
        super().__init__(optimizer, last_batch_iteration)
        name = type(self).__name__
        # At least 2: ln(1) is 0, and a warmup of one step would divide by it.
        self.warmup_num_steps = max(2, positive_int(f"{name}.warmup_num_steps", warmup_num_steps))
        self.warmup_type = choice(f"{name}.warmup_type", warmup_type, WARMUP_TYPES)

    def _apply_first(self) -> None:
        super()._apply_first()
        first_two = [*self._lr_at(-1), *self._lr_at(0)]
        if self.last_batch_iteration == -1 and self.warmup_num_steps < _SHORT_WARMUP and not any(first_two):
            _warn(
                f"{type(self).__name__}: the first two of {self.warmup_num_steps} warmup steps run at learning rate 0"
            )

    def _gamma(self, t: int) -> float:
        """Return how far the rate has come at ``t`` >= 0: from 0 towards 1 in the warmup, :meth:`_later` after it."""
        if t >= self.warmup_num_steps:
            return self._later(t)
        if self.warmup_type == "log":
            return math.log(t + 1) / math.log(self.warmup_num_steps)
        return t / self.warmup_num_steps

    def _later(self, t: int) -> float:
        return 1.0

    def _warn_if_short(self, total_num_steps: int) -> None:
        if total_num_steps < self.warmup_num_steps:
            _warn(
                f"{type(self).__name__}: total_num_steps {total_num_steps} is less than "
                f"warmup_num_steps {self.warmup_num_steps}"
            )


def _warn(message: str) -> None:
    log_dist(message, level=logging.WARNING)


class WarmupLR(_Warmup):
    """Rise from a minimal to a maximal rate, then stay there.

    lr = min for t < 0, min + (max - min) g(t) for t < W, max after. The first two updates both run at the minimum.

    Args:
        optimizer: a torch optimizer, or a wrapper with one as ``.optimizer``.
        warmup_min_lr: one number, or one per parameter group.
        warmup_max_lr: one number, one per group, or None for each group's rate at construction.
        warmup_num_steps: W, an int of at least 1; 1 counts as 2.
        warmup_type: ``"log"`` or ``"linear"``.
        last_batch_iteration: t to go on from.

    Raises:
        ConfigError: a value is not of the kind above. It is also a ``ValueError``.

    >>> import torch
    >>> sgd = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> schedule = WarmupLR(sgd, warmup_num_steps=10, warmup_type="linear")
    >>> for _ in range(6):
    ...     sgd.step()
    ...     schedule.step()
    >>> schedule.get_last_lr()
    [0.5]
    """

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        self._given = warmup_min_lr, warmup_max_lr
        self.min_lrs: list[float] = []
        self.max_lrs: list[float] = []
        self.follow_groups()

    def _take_groups(self) -> None:
        lowest, highest = self._given
        min_lrs = self._per_group("warmup_min_lr", lowest)
        new = self._group_lrs(len(self.max_lrs))
        self.max_lrs = [*self.max_lrs, *new] if highest is None else self._per_group("warmup_max_lr", highest)
        self.min_lrs = min_lrs

    def _lr_at(self, t: int) -> list[float]:
        if t < 0:
            return list(self.min_lrs)
        gamma = self._gamma(t)
        return [low + (high - low) * gamma for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]


class WarmupDecayLR(WarmupLR):
    """Rise as :class:`WarmupLR`, then fall on a line back to the minimal rate.

    With T = ``total_num_steps``: lr = min + (max - min) max(0, (T-t) / max(1, T-W)) for t >= W.

    Args:
        optimizer: as in :class:`WarmupLR`, like every argument not listed here.
        total_num_steps: T, an int of at least 1. Below W the rate drops to the minimum as soon as the warmup ends.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        # Before the rest, which writes to the optimizer.
        self.total_num_steps = positive_int(f"{type(self).__name__}.total_num_steps", total_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)
        self._warn_if_short(total_num_steps)

    def _later(self, t: int) -> float:
        left = (self.total_num_steps - t) / max(1, self.total_num_steps - self.warmup_num_steps)
        return max(0.0, left)


class WarmupCosineLR(_Warmup):
    """Rise to near the group's own rate, then fall on half a cosine wave.

    base is the group's rate at construction, a = ``warmup_min_ratio``, c = ``cos_min_ratio``, T = ``total_num_steps``.
    lr = 0 for t < 0, else base r: r = a + (1-a) g(t) for t < W, then with p = min(1, (t-W+1) / max(1, T-W))
    r = c + (1-c) (1 + cos(pi p)) / 2. The ratio 1 itself is never reached.

    Args:
        optimizer: as in :class:`WarmupLR`, like every argument not listed here.
        total_num_steps: T, an int of at least 1.
        warmup_min_ratio: a, the ratio of the second update; the first runs at rate 0.
        cos_min_ratio: c, the ratio at the end and after it.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        self.total_num_steps = positive_int(f"{type(self).__name__}.total_num_steps", total_num_steps)
        self.warmup_min_ratio = self._finite("warmup_min_ratio", warmup_min_ratio)
        self.cos_min_ratio = self._finite("cos_min_ratio", cos_min_ratio)
        self.base_lrs: list[float] = []
        self._warn_if_short(total_num_steps)
        self.follow_groups()

    def _take_groups(self) -> None:
        self.base_lrs += self._group_lrs(len(self.base_lrs))

    def _lr_at(self, t: int) -> list[float]:
        ratio = self._ratio(t)
        return [base * ratio for base in self.base_lrs]

    def _ratio(self, t: int) -> float:
        if t < 0:
            return 0.0
        if t < self.warmup_num_steps:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * self._gamma(t)
        progress = (t - self.warmup_num_steps + 1) / max(1, self.total_num_steps - self.warmup_num_steps)
        wave = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return self.cos_min_ratio + (1 - self.cos_min_ratio) * wave
