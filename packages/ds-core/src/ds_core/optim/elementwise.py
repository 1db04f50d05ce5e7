"""Which optimizers update each element by itself, so that they can be given any part of a parameter."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ds_core.interfaces.optimizer import ELEMENTWISE

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["elementwise", "is_elementwise"]

FactoryT = TypeVar("FactoryT", bound="Callable[..., Any]")


_OF_TORCH = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)
"""Not Adafactor (factors of rows and columns, a norm) and Muon (matrices)."""


def elementwise(factory: FactoryT) -> FactoryT:
    """Mark a class, or a function that builds an optimizer, as one whose optimizers update each element by itself."""
    setattr(factory, ELEMENTWISE, True)
    return factory


def is_elementwise(optimizer: Any) -> bool:
    """Return whether ``optimizer`` updates each element from its own gradient and state alone.

    Args:
        optimizer: an optimizer, its class, or a callable that builds one. Exactly the classes of torch that are known
            to, and those that say so by ``elementwise = True``; of anything else it cannot be known.
    """
    while isinstance(optimizer, functools.partial):
        optimizer = optimizer.func
    made_by = type(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    # Said by itself: what a subclass does in its step, its base does not know.
    return made_by in _OF_TORCH or getattr(made_by, "__dict__", {}).get(ELEMENTWISE) is True
