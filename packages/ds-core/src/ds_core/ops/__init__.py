"""Ops by name: ``best`` chooses the implementation for a device, and says why.

>>> import torch
>>> from ds_core.ops import best
>>> choice = best("sum_of_squares", torch.device("cpu"))
>>> float(choice.implementation([torch.ones(3)]))
3.0
>>> choice.provider
'torch'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ds_core import registry
from ds_core.errors import PluginError, nearest

if TYPE_CHECKING:
    import torch

    from ds_core.interfaces.ops import OpProvider

__all__ = ["Choice", "best", "report"]


@dataclass(frozen=True)
class Choice:
    """Which implementation of an op runs on a device, and why not the others."""

    op: str
    provider: str
    implementation: Callable[..., Any]
    why: str
    rejected: tuple[tuple[str, str], ...] = ()
    """(provider, reason) of those with a higher priority that cannot run."""

    def __str__(self) -> str:
        others = "".join(f"; not {name}: {why}" for name, why in self.rejected)
        return f"{self.op}: {self.provider} ({self.why}{others})"


def best(op: str, device: torch.device) -> Choice:
    """Return the usable implementation of ``op`` of highest priority for ``device``; kept per kind of device.

    Raises:
        PluginError: nobody has an op of that name.
    """
    return _best(op, device.type)


@cache
def _best(op: str, device_type: str) -> Choice:
    import torch

    device = torch.device(device_type)
    rejected: list[tuple[str, str]] = []
    known: set[str] = set()
    for name, provider in _providers():
        known |= provider.ops()
        if op not in provider.ops():
            continue
        offer = provider.offer(op, device)
        if offer.usable:
            return Choice(op, name, provider.implementation(op), offer.why, tuple(rejected))
        rejected.append((name, offer.why))
    close = nearest(op, known)
    reasons = "; ".join(f"{name}: {why}" for name, why in rejected)
    raise PluginError(
        f"no implementation of op {op!r} runs on {device_type}" if rejected else f"no op is called {op!r}",
        where=reasons or f"known: {', '.join(sorted(known))}",
        fix=f"did you mean {close!r}?" if close and not rejected else None,
    )


@cache
def _providers() -> tuple[tuple[str, OpProvider], ...]:
    found = [(name, registry.load("ops", name)()) for name in registry.names("ops")]
    return tuple(sorted(found, key=lambda pair: (-pair[1].priority, pair[0])))


def report(device: torch.device) -> list[Choice]:
    """Return the choice for every op that runs on ``device``, by name."""
    ops = sorted(set().union(*(provider.ops() for _, provider in _providers())))
    return [best(op, device) for op in ops]
