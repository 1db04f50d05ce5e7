"""Which of an optimizer's slots have a value per element of their tensor, and which belong to a parameter as a whole.

Note: of elements, or of the whole. A slot of its tensor's shape has a value per element, such as a moment; one of
another shape belongs to the parameter as a whole, such as a step count or a factor of rows. Where both have one element
the shape does not tell; then a slot is what it is of the optimizer's other parameters, and ``step`` is a count.

Whoever cuts, stores, loads or puts together optimizer state asks here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    Shape = Sequence[int]

__all__ = ["is_per_element", "of_whole_parameters", "shapes_in"]


def of_whole_parameters(slots: Iterable[tuple[str, Shape, Shape]]) -> set[str]:
    """Return the names of the slots that belong to a parameter as a whole.

    Args:
        slots: of all parameters of the optimizer: name of the slot, its shape, the shape of its tensor.

    >>> sorted(of_whole_parameters([("exp_avg", (4, 3), (4, 3)), ("row", (4,), (4, 3))]))
    ['row', 'step']
    """
    return {"step"}.union(slot for slot, shape, of in slots if tuple(shape) != tuple(of))


def is_per_element(slot: str, shape: Shape, of: Shape, of_whole: Collection[str]) -> bool:
    """Return whether a slot of ``shape`` has a value per element of its tensor, of shape ``of``.

    ``of_whole`` is what :func:`of_whole_parameters` found.

    >>> is_per_element("exp_avg", (4, 3), (4, 3), {"step"}), is_per_element("step", (), (), {"step"})
    (True, False)
    """
    return tuple(shape) == tuple(of) and not (math.prod(shape) == 1 and slot in of_whole)


def shapes_in(state: Mapping[Any, Any]) -> Iterator[tuple[str, Shape, Shape]]:
    """Yield what :func:`of_whole_parameters` takes for each tensor in the ``state`` of an optimizer."""
    for tensor, slots in state.items():
        if isinstance(tensor, torch.Tensor):
            for slot, value in slots.items():
                if isinstance(value, torch.Tensor):
                    yield slot, value.shape, tensor.shape
