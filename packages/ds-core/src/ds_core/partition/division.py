"""By what gradients are divided, and when: before the collective that sums them over the ranks, or after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_core.config import Config

__all__ = ["Division", "divide", "division_of"]


@dataclass(frozen=True)
class Division:
    """Two factors; their product makes of the sum over the ranks what was asked for, the mean or the sum itself."""

    before: float
    """Multiplied into the loss, and so into what a rank sends: this costs nothing."""
    after: float
    """Multiplied into what a collective returns: one more pass, where it is not 1."""


def divide(world_size: int, *, is_mean: bool = True, predivide: float = 1.0, is_prescaled: bool = False) -> Division:
    """Return the division among ``world_size`` ranks.

    Args:
        world_size: ranks that a collective sums over.
        is_mean: the mean is wanted; if not, the sum, and the rest does not matter.
        predivide: divide by this before the sum and by the rest after it, so that neither what is sent nor what is
            summed leaves the range of a narrow dtype. 1: all of it before.
        is_prescaled: all of it before, whatever ``predivide`` says.

    >>> divide(4), divide(4, predivide=2.0)
    (Division(before=0.25, after=1.0), Division(before=0.5, after=0.5))
    """
    if world_size == 1 or not is_mean:
        return Division(1.0, 1.0)
    if is_prescaled or predivide == 1.0:
        return Division(1.0 / world_size, 1.0)
    return Division(1.0 / predivide, predivide / world_size)


def division_of(config: Config, world_size: int) -> Division:
    """Return the division that ``config`` asks for."""
    return divide(
        world_size,
        is_mean=config.gradient_allreduce_op == "mean",
        predivide=config.gradient_predivide_factor,
        is_prescaled=config.prescale_gradients,
    )
