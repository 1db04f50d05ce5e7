"""Seam ``engine``: another engine class for a model or configuration, such as a pipeline.

Contract: ``ds_core.testing.engine``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ds_core.config import Config

__all__ = ["EngineProvider"]


class EngineProvider(ABC):
    """Decides whether its engine takes a model, and builds it."""

    @abstractmethod
    def matches(self, model: nn.Module, config: Config) -> bool:
        """Return whether this engine, rather than the plain one, must run ``model``. At most one provider may."""

    @abstractmethod
    def build(self, **arguments: Any) -> Any:
        """Return the engine; the arguments are those of ``ds_core.initialize``, with ``config`` loaded.

        The engine has ``optimizer``, ``training_dataloader`` and ``lr_scheduler`` (each may be None).
        """
