"""A partition of our own: the built-in one, with a witness."""

from __future__ import annotations

from typing import TYPE_CHECKING

from acme_ds import journal
from ds_core.partition.replicated import ReplicatedPartition

if TYPE_CHECKING:
    from ds_core.interfaces.partition import SquaredNorm


class WatchedPartition(ReplicatedPartition):
    """Writes down when gradients are reduced and weights are published."""

    def reduce(self) -> SquaredNorm:
        journal.entries.append("partition reduce")
        return super().reduce()

    def publish(self) -> None:
        journal.entries.append("partition publish")
        super().publish()
