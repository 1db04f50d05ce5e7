"""The kind of device this process trains on: ``get_accelerator()``.

An accelerator is a plugin of the seam ``accelerator``; its entry name is the word in ``DS_ACCELERATOR``. Importing this
package touches no device and loads no torch.

>>> from ds_core.accelerator import get_accelerator
>>> get_accelerator().device_name() in ("cpu", "cuda")
True
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

from ds_core import registry
from ds_core.errors import EngineError
from ds_core.interfaces.accelerator import Accelerator
from ds_core.log import logger

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Accelerator", "get_accelerator", "is_current_accelerator_supported", "set_accelerator"]

ENVIRONMENT_VARIABLE = "DS_ACCELERATOR"

# One per process, as in DeepSpeed's API (docs/design/globals.md); set_accelerator(None) resets it.
_active: Accelerator | None = None


def get_accelerator() -> Accelerator:
    """Return the accelerator of this process, chosen at the first call and kept.

    ``DS_ACCELERATOR`` names it; without the variable the first available one is taken: cuda, then what other packages
    bring, in order of their names, then cpu.

    Raises:
        PluginError: ``DS_ACCELERATOR`` names no installed accelerator.
        EngineError: it names one that has no device here.
    """
    global _active
    if _active is None:
        wanted = os.environ.get(ENVIRONMENT_VARIABLE)
        _active = _named(wanted) if wanted else _first_available()
        logger.debug("accelerator: %s", _active.device_name())
    return _active


def set_accelerator(accelerator: Accelerator | None) -> None:
    """Make ``accelerator`` the one of this process; None lets the next :func:`get_accelerator` choose again.

    Raises:
        EngineError: it is not an :class:`~ds_core.interfaces.accelerator.Accelerator`.
    """
    global _active
    if accelerator is not None and not isinstance(accelerator, Accelerator):
        raise EngineError(
            f"set_accelerator got a {type(accelerator).__name__}, expected an Accelerator",
            fix="derive its class from ds_core.interfaces.accelerator.Accelerator",
        )
    _active = accelerator


def is_current_accelerator_supported() -> bool:
    """Return whether the accelerator in use is an installed plugin, rather than an object of the caller's own."""
    return get_accelerator().device_name() in registry.names("accelerator")


def _named(name: str) -> Accelerator:
    accelerator = _build(name, needed_by=ENVIRONMENT_VARIABLE)
    if not accelerator.is_available():
        raise EngineError(
            f"accelerator {name!r} has no device that this process can use",
            where=f"{ENVIRONMENT_VARIABLE}={name}",
            fix=f"one of {', '.join(_available(registry.names('accelerator')))}, or unset {ENVIRONMENT_VARIABLE}",
        )
    return accelerator


def _first_available() -> Accelerator:
    # cpu is last whatever its name sorts to: it is always available.
    others = sorted(set(registry.names("accelerator")) - {"cuda", "cpu"})
    return _build(next(iter(_available(("cuda", *others, "cpu")))))


def _available(names: Iterable[str]) -> Iterable[str]:
    return (name for name in names if _build(name).is_available())


def _build(name: str, needed_by: str | None = None) -> Accelerator:
    return cast("Accelerator", registry.load("accelerator", name, needed_by=needed_by)())
