"""What every schedule here shares: its groups, its one number of state, and how a rate reaches the optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from ds_core.errors import ConfigError, EngineError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["GroupSchedule", "NotSteppedError", "choice", "finite", "positive_int"]


class NotSteppedError(EngineError, AssertionError):
    """No rate has been applied yet. Clients of DeepSpeed catch it as an ``AssertionError``."""


class GroupSchedule(ABC):
    """A learning rate per parameter group as a function of one counter, ``last_batch_iteration``.

    The counter, t, is -1 at the start and k-1 after k steps. As a schedule steps after its optimizer, the j-th update
    (from 1) runs at t = j-2: the rate written at construction serves the first update, and the one of t = 0 the second.

    Args:
        optimizer: a torch optimizer, or a wrapper with one as ``.optimizer``.
        last_batch_iteration: the counter to go on from. At -1 the first rate is written to the optimizer at once.

    Raises:
        TypeError: neither ``optimizer`` nor its ``.optimizer`` is a torch optimizer.
    """

    def __init__(self, optimizer: Any, last_batch_iteration: int = -1) -> None:
        self.optimizer = _torch_optimizer(optimizer)
        self.last_batch_iteration = last_batch_iteration
        self._last_lr: list[float] | None = None

    @abstractmethod
    def _lr_at(self, t: int) -> list[float]:
        """Return the rate of every group when the counter is ``t``. A pure function of ``t`` and the arguments."""

    def get_lr(self) -> list[float]:
        """Return the rate of every group at the counter's present value, applied or not."""
        return self._lr_at(self.last_batch_iteration)

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Move on by one, or to ``last_batch_iteration``, and write the rates into the optimizer's groups."""
        following = self.last_batch_iteration + 1
        self.last_batch_iteration = following if last_batch_iteration is None else last_batch_iteration
        self._apply()

    def get_last_lr(self) -> list[float]:
        """Return the rates in force: those applied last, or those the loaded state stands for.

        Raises:
            NotSteppedError: the schedule began at a given ``last_batch_iteration`` and has not stepped since.
        """
        if self._last_lr is None:
            raise NotSteppedError("need to call step() first: no learning rate was applied yet", fix="call step()")
        return list(self._last_lr)

    def state_dict(self) -> dict[str, int]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. The optimizer keeps its rates until the next :meth:`step`.

        They come back with the optimizer's own state, in which they are stored.
        """
        self.last_batch_iteration = int(state["last_batch_iteration"])
        self._last_lr = self.get_lr()

    def follow_groups(self) -> None:
        """Drive groups that the optimizer got since, as if they had been there at construction.

        Raises:
            ConfigError: it was given one number per group.
        """
        self._take_groups()
        self._apply_first()

    @abstractmethod
    def _take_groups(self) -> None:
        """Know the rates of groups that are not known yet; their own are still those they came with.

        Where it raises, nothing has changed.
        """

    def _apply_first(self) -> None:
        """Write the first rates, unless the schedule goes on from somewhere. Called at the end of construction."""
        if self.last_batch_iteration == -1:
            self._apply()

    def _apply(self) -> None:
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                # Captured graphs and capturable optimizers hold this very tensor.
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _group_lrs(self, first: int = 0) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups[first:]]

    def _per_group(self, name: str, value: float | Sequence[float]) -> list[float]:
        """Return one number per parameter group: ``value`` repeated, or the list it is."""
        groups = len(self.optimizer.param_groups)
        if not isinstance(value, (list, tuple)):
            return [self._finite(name, value)] * groups
        if len(value) != groups:
            raise ConfigError(
                f"{name} has {len(value)} values, the optimizer has {groups} parameter groups",
                where=f"{type(self).__name__}.{name}",
                fix="give one number for all groups, or one per group",
            )
        return [self._finite(name, one) for one in value]

    def _finite(self, name: str, value: Any) -> float:
        return finite(f"{type(self).__name__}.{name}", value)


def finite(where: str, value: Any) -> float:
    """Return ``value`` as a float, or raise a ConfigError naming ``where``."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ConfigError(f"{_name(where)} is {value!r}, expected a finite number", where=where)
    return float(value)


def positive_int(where: str, value: Any) -> int:
    """Return ``value``, or raise a ConfigError naming ``where``; 4.0 is not an int."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ConfigError(f"{_name(where)} is {value!r}, expected an int of at least 1", where=where)
    return int(value)


def choice(where: str, value: Any, allowed: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``allowed``, or raise a ConfigError naming ``where``."""
    if value not in allowed:
        close = nearest(str(value), allowed)
        raise ConfigError(
            f"{_name(where)} is {value!r}, allowed are {', '.join(allowed)}",
            where=where,
            fix=f"did you mean {close!r}?" if close else f"use one of {', '.join(allowed)}",
        )
    return str(value)


def _name(where: str) -> str:
    return where.rpartition(".")[2]


def _torch_optimizer(optimizer: Any) -> Optimizer:
    for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
        if isinstance(candidate, Optimizer):
            return candidate
    raise TypeError(f"{type(optimizer).__name__} is not a torch optimizer, and neither is its .optimizer")
