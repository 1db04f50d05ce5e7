"""Seam ``scheduler``: a name in ``scheduler.type`` -> a learning-rate schedule, matched as written.

Contract: ``ds_core.testing.scheduler``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["LRSchedule", "ScheduleFactory"]


class LRSchedule(Protocol):
    """What the engine asks of a schedule, built in or the client's own; torch's schedulers are such."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Move on by one. Called once per optimizer step that was not skipped, after the update."""

    def get_last_lr(self) -> list[float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ScheduleFactory(Protocol):
    def __call__(self, optimizer: Optimizer, /, **params: Any) -> LRSchedule:
        """Return a schedule of every group of ``optimizer``, the inner torch optimizer.

        Raises:
            TypeError: for a key of ``scheduler.params`` it does not know.
            ValueError: for a value it cannot use.
        """
