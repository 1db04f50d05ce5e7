"""Logging: one logger, rank 0 speaks, nothing is set up at import."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["configure", "log_dist", "logger", "reset"]

logger = logging.getLogger("ds_core")
"""The one logger of all ``ds-*`` packages."""

LEVELS = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")}
_FORMAT = "[%(asctime)s] [%(levelname)s] [ds] %(message)s"
_OURS = "_ds_core_handler"


def configure(level: str | None) -> None:
    """Make the logger audible, unless the application has set up logging itself; set its level where one is given.

    Args:
        level: debug, info, warning, error or critical; None leaves an application's level alone, else info.
    """
    if level is not None and level.lower() not in LEVELS:
        raise ConfigError(f"log_level is {level!r}", where="log_level", fix=f"one of {', '.join(LEVELS)}")
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_FORMAT, "%H:%M:%S"))
        setattr(handler, _OURS, True)
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.INFO)
    if level is not None:
        logger.setLevel(LEVELS[level.lower()])


def reset() -> None:
    """Undo :func:`configure`; for tests."""
    for handler in [handler for handler in logger.handlers if hasattr(handler, _OURS)]:
        logger.removeHandler(handler)
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log ``message`` on the global ranks given, on rank 0 if None, on all if the first is -1."""
    rank = int(os.environ.get("RANK", "0"))
    chosen = (0,) if ranks is None else tuple(ranks)
    if rank in chosen or (chosen and chosen[0] == -1):
        logger.log(level, message if ranks is None else f"[Rank {rank}] {message}")
