"""Values of which some could not be taken over from a checkpoint that others wrote: asking for those says why.

Who reads such a checkpoint puts the reasons beside the values: ``client_state`` and ``client_state_missing``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NoReturn

from ds_core.errors import CheckpointError
from ds_core.log import log_dist

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Partly", "values_of"]


class Partly(dict[str, Any]):
    """What there is, by name; ``reasons`` has the others, which seem to be there until they are asked for.

    >>> state = Partly({"epoch": 3}, {"mask": "a tensor of 4 GB"}, "client_state")
    >>> state["epoch"], "mask" in state, list(state)
    (3, True, ['epoch'])
    """

    def __init__(self, values: Mapping[str, Any], reasons: Mapping[str, str], what: str) -> None:
        super().__init__(values)
        self.reasons, self.what = dict(reasons), what

    def told(self) -> str:
        """Return in words what is not there, and why."""
        return "; ".join(f"{self.what} has no {name!r}: {reason}" for name, reason in self.reasons.items())

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.reasons

    def __missing__(self, name: str) -> NoReturn:
        if name not in self.reasons:
            raise KeyError(name)
        raise CheckpointError(
            f"the checkpoint has {name!r}, and it cannot be read: {self.reasons[name]}",
            where=f"{self.what}[{name!r}]",
            fix="get it from the checkpoint with what wrote it, and keep it in a file of its own",
        )

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name, default) if name not in self.reasons else self[name]

    def pop(self, name: str, *default: Any) -> Any:
        return super().pop(name, *default) if name in self.keys() or name not in self.reasons else self[name]


def values_of(
    state: Mapping[str, Any], key: str, decode: Callable[[Any], Any] = lambda value: value, *, warn: bool = False
) -> Any:
    """Return the values ``key`` of a checkpoint's state, so that asking for one that could not be taken over raises.

    Args:
        state: ``<key>_missing`` in it has the reasons, where there are any.
        key: such as ``client_state``.
        decode: of the values, where they are not decoded yet.
        warn: tell on rank 0 what is not there.
    """
    values, reasons = decode(state.get(key, {})), state.get(f"{key}_missing")
    if not isinstance(reasons, dict) or not isinstance(values, dict):
        return values
    found = Partly(values, reasons, key)
    if warn:
        log_dist(found.told(), level=logging.WARNING)
    return found
