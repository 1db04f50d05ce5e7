"""Which optimizers update each element by itself, so that they can be given any part of a parameter."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ds_core.interfaces.optimizer import ELEMENTWISE

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OF_TORCH", "WHOLE_OF_TORCH", "elementwise", "is_elementwise", "known_of"]

FactoryT = TypeVar("FactoryT", bound="Callable[..., Any]")


OF_TORCH = (
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
"""All of torch's that are."""
WHOLE_OF_TORCH = (torch.optim.Adafactor, torch.optim.Muon)
"""Those of torch's that look at a parameter as a whole: factors of rows and columns and a norm; matrices."""

_HARMLESS = frozenset(
    {
        *("__init__", "__setstate__", "__repr__", "__module__", "__qualname__", "__doc__", "__annotations__"),
        *("__slots__", "__dict__", "__weakref__", "__parameters__", "__orig_bases__", "__firstlineno__"),
        *("__static_attributes__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
        *("add_param_group", "zero_grad", "state_dict", "load_state_dict"),
    }
)
"""What a subclass may have of its own without another update."""


def elementwise(factory: FactoryT) -> FactoryT:
    """Mark a class, or a function that builds an optimizer, as one whose optimizers update each element by itself.

    ``ds_core.testing.optimizer`` checks that it is so.
    """
    setattr(factory, ELEMENTWISE, True)
    return factory


def is_elementwise(optimizer: Any) -> bool:
    """Return whether ``optimizer`` is known to update each element from its own gradient and state alone.

    Args:
        optimizer: an optimizer, its class, or a callable that builds one. Those are the classes of torch that are known
            to, those that say so by ``elementwise = True``, and subclasses of both that override nothing but their
            constructor and what has no part in a step. Of anything else it cannot be known.
    """
    return known_of(optimizer) is True


def known_of(optimizer: Any) -> bool | None:
    """Return what :func:`is_elementwise` does, but None where it is not known."""
    while isinstance(optimizer, functools.partial):
        optimizer = optimizer.func
    made_by = type(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    for cls in made_by.__mro__ if isinstance(made_by, type) else (made_by,):
        own = getattr(cls, "__dict__", {})
        if ELEMENTWISE in own:
            return own[ELEMENTWISE] is True
        if cls in OF_TORCH or cls in WHOLE_OF_TORCH:
            return cls in OF_TORCH
        # What a subclass does in its step, its base does not know.
        if not isinstance(cls, type) or any(_changes_the_update(cls, name, value) for name, value in own.items()):
            return None
    return None


def _changes_the_update(cls: type, name: str, value: Any) -> bool:
    """Return whether ``value``, which ``cls`` has as ``name``, may stand for another update than that of its bases."""
    if name in _HARMLESS:
        return False
    of_bases = [vars(base)[name] for base in cls.__mro__[1:] if base is not object and name in vars(base)]
    if not of_bases:
        return name == "step_scaled"
    # torch wraps the step of a class when its first optimizer is made, and leaves the wrapper in the class.
    return not (callable(value) and inspect.unwrap(value) is inspect.unwrap(of_bases[0]))
