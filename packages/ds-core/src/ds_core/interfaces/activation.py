"""Seam ``activation``: recompute, offload or partition what backward needs. The built-in is torch's own recomputation.

Contract: ``ds_core.testing.activation``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import nn
    from torch.distributed import ProcessGroup

    from ds_core.config import Config

__all__ = ["ActivationCheckpointing", "Attached"]


class Attached:
    """What an engine's section does to its model; this one does nothing."""

    def active(self) -> AbstractContextManager[object]:
        """Return a context in which the engine's forward runs."""
        return nullcontext()

    def report(self) -> Mapping[str, str]:
        """Return lines for ``engine.report()``."""
        return {}

    def detach(self) -> None:
        """Leave the model as it was. Safe to repeat."""


class ActivationCheckpointing(ABC):
    """One way to run a function without keeping its inner activations."""

    @classmethod  # noqa: B027 - most refuse nothing
    def check_config(cls, config: Config) -> None:
        """Refuse what the section ``activation_checkpointing`` asks for, before a process group is touched.

        It may look at what this process has set up, such as an mpu; what the section alone tells is a rule of the
        configuration (``ds_core.config.checks``), which ``ds config check`` knows too.

        Raises:
            ConfigError: it cannot be.
        """

    @abstractmethod
    def checkpoint(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return ``function(*args, **kwargs)``, its inner activations computed again in backward.

        Outputs and gradients equal those without it, random layers included.
        """

    def attach(self, module: nn.Module, config: Config, group: ProcessGroup, device: torch.device) -> Attached:
        """Do to ``module`` what the section asks for; called once per engine, by every rank, before the first forward.

        Args:
            module: on its device, in its final dtypes; its names and its class stay.
            config: whose ``activation_checkpointing`` says something.
            group: the ranks of the engine.
            device: of this rank.

        Raises:
            ConfigError: a pattern names no module.
        """
        return Attached()
