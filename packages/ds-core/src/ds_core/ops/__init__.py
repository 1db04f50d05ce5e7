"""Named operations, each run by the best implementation on a device: ``best(op, device)`` says which, and why.

An implementation comes from a provider, a plugin of the seam ``ops``; torch's reference is built in. Nothing is
compiled or built here: a provider that cannot run is passed over, with its reason.

>>> import torch
>>> choice = best("sum_of_squares", "cpu")
>>> choice.implementation([torch.full((3,), 2.0)])
tensor(12., dtype=torch.float64)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ds_core import registry
from ds_core.errors import PluginError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ds_core.interfaces.ops import OpProvider

__all__ = ["Choice", "best", "report"]


@dataclass(frozen=True)
class Choice:
    """Which implementation of an op runs on a device, and why. Prints as one line per provider."""

    op: str
    device: str
    provider: str
    """The entry name of the provider taken."""
    implementation: Callable[..., Any] = field(repr=False)
    why: str
    rejected: tuple[tuple[str, str], ...]
    """(provider, reason) for each other one that has the op."""

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.provider} ({self.why})"]
        lines += [f"  not {provider}: {reason}" for provider, reason in self.rejected]
        return "\n".join(lines)


def best(op: str, device: torch.device | str) -> Choice:
    """Return the implementation of ``op`` to use for tensors on ``device``.

    Of the providers that can run it the one of highest priority is taken, the first by name among equals. Providers
    are asked anew at each call; a caller in a hot path keeps the choice.

    Raises:
        PluginError: no provider has the op, or none can run it on ``device``; the error gives each one's reason.
    """
    where = _device(device)
    found = _providers()
    having = {name: provider for name, provider in found.items() if op in provider.ops()}
    if not having:
        known = sorted(set().union(*(provider.ops() for provider in found.values())))
        close = nearest(op, known)
        raise PluginError(
            f"no op is called {op!r}",
            where=f"the ops here are {', '.join(known)}",
            fix=f"did you mean {close!r}?" if close else "install the package that provides it",
        )
    usable: dict[str, str] = {}
    rejected: list[tuple[str, str]] = []
    for name, provider in having.items():
        offer = provider.offer(op, where)
        if offer.usable:
            usable[name] = offer.why
        else:
            rejected.append((name, offer.why))
    if not usable:
        raise PluginError(
            f"no provider can run {op!r} on {where}: " + "; ".join(f"{name}: {why}" for name, why in rejected),
            fix="use another device, or install a package that provides the op for this one",
        )
    taken, *others = sorted(usable, key=lambda name: (-having[name].priority, name))
    rank = having[taken].priority
    rejected += [(name, f"priority {having[name].priority} against {taken}'s {rank}") for name in others]
    return Choice(op, str(where), taken, having[taken].implementation(op), usable[taken], tuple(rejected))


def report(device: torch.device | str) -> dict[str, Choice | PluginError]:
    """Return op -> what :func:`best` returns for it on ``device``, or the error it raises, for every op known here."""
    names = sorted(set().union(*(provider.ops() for provider in _providers().values())))
    return {name: _best_or_why_not(name, device) for name in names}


def _best_or_why_not(op: str, device: torch.device | str) -> Choice | PluginError:
    try:
        return best(op, device)
    except PluginError as error:
        return error


def _providers() -> dict[str, OpProvider]:
    return {name: registry.load("ops", name)() for name in registry.names("ops")}


def _device(device: torch.device | str) -> torch.device:
    import torch

    return torch.device(device)
