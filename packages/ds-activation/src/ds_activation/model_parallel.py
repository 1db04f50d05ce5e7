"""Where this process stands among those that hold one model together, as its ``mpu`` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup

__all__ = ["ALONE", "Place", "place_in", "refuse_no_mpu", "tp_rank_in"]

_GROUPS = ("tensor_model_parallel", "model_parallel")
"""Words in the names of an mpu's getters, the first there are: ``get_tensor_model_parallel_rank``, ..."""
_RANKS = ("tensor_model_parallel", "slice_parallel", "model_parallel")
"""The same for the rank that seeds are made of."""


@dataclass(frozen=True)
class Place:
    """A rank of a model-parallel group."""

    rank: int
    size: int
    group: ProcessGroup | None
    """None: the default group, where ``size`` is more than 1."""


ALONE = Place(0, 1, None)


def place_in(mpu: Any) -> Place:
    """Return what ``mpu`` says of this process; without one it is alone.

    Raises:
        ConfigError: it has not the methods of an mpu.
    """
    if mpu is None:
        return ALONE
    rank, size, group = (getter() for getter in _getters(mpu))
    return Place(int(rank), int(size), group)


def refuse_no_mpu(mpu: Any) -> None:
    """Raise where ``mpu`` is none; it is not asked yet: its groups may come later.

    Raises:
        ConfigError: it has not the methods of an mpu.
    """
    _getters(mpu)


def tp_rank_in(mpu: Any) -> int:
    """Return the rank that random numbers differ by; 0 without an mpu."""
    if mpu is None:
        return 0
    for words in _RANKS:
        getter = getattr(mpu, f"get_{words}_rank", None)
        if callable(getter):
            return int(getter())
    return place_in(mpu).rank  # raises


def _getters(mpu: Any) -> list[Callable[[], Any]]:
    """Return the getters of rank, size and group."""
    for words in _GROUPS:
        found = [getattr(mpu, f"get_{words}_{what}", None) for what in ("rank", "world_size", "group")]
        getters = [getter for getter in found if callable(getter)]
        if len(getters) == len(found):
            return getters
    raise ConfigError(
        f"the mpu, a {type(mpu).__name__}, has not the methods of one",
        where="checkpointing.configure(mpu_)",
        fix="give it get_model_parallel_rank(), get_model_parallel_world_size() and get_model_parallel_group(), "
        "or the same with tensor_model_parallel",
    )
