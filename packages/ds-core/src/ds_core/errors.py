"""The errors users see: what was wrong, where, and how to fix it.

Torch-free. Every error a ``ds-*`` package raises for a user's mistake derives from :class:`DsError`;
``assert`` is left for what only our own bug can break.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "CommError",
    "ConfigError",
    "DataError",
    "DsError",
    "EngineError",
    "LaunchError",
    "LossScaleError",
    "MissingPackageError",
    "NotBuiltError",
    "PluginError",
    "nearest",
]


class DsError(Exception):
    """Base of all errors for users; prints as three short lines.

    Args:
        what: what was wrong, with the value received and the values allowed.
        where: file, key, parameter or rank it was found at.
        fix: what to do about it.

    >>> print(DsError("stage is 7, allowed are 0 to 3", where="zero_optimization.stage", fix="use 0, 1, 2 or 3"))
    stage is 7, allowed are 0 to 3
      where: zero_optimization.stage
      fix: use 0, 1, 2 or 3
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what, where, fix)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel between ranks; the default protocol cannot pass keyword-only arguments.
        return _rebuild, (type(self), self.what, self.where, self.fix)


def _rebuild(cls: type[DsError], what: str, where: str | None, fix: str | None) -> DsError:
    return cls(what, where=where, fix=fix)


class ConfigError(DsError, ValueError):
    """The configuration cannot be used (``DeepSpeedConfigError`` is this class)."""


class PluginError(DsError, LookupError):
    """A plugin is missing, ambiguous, or made for another ``ds-core``."""


class MissingPackageError(PluginError, AttributeError):
    """A name or option needs a package that is not installed; the fix is the command that installs it.

    Also an ``AttributeError``, so that ``hasattr(ds_core, name)`` is False until the package is there.
    """


class NotBuiltError(DsError, NotImplementedError, AttributeError):
    """A name or option of DeepSpeed's that no released ``ds-*`` package offers yet."""


class EngineError(DsError, RuntimeError):
    """The engine was called with the wrong thing or in the wrong order."""


class DataError(DsError, ValueError):
    """The training data cannot be loaded as asked."""


class CheckpointError(DsError, RuntimeError):
    """A checkpoint cannot be written or read."""


class LossScaleError(DsError, ArithmeticError):
    """Gradients overflow at the smallest loss scale allowed; lowering it further is not."""


class CommError(DsError, RuntimeError):
    """Ranks disagree, or one of them is gone."""


class LaunchError(DsError, RuntimeError):
    """The ranks of a job cannot be started."""


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed word most like ``word``, ignoring case, or None if none is close.

    >>> nearest("zero_optimisation", ["optimizer", "zero_optimization"])
    'zero_optimization'
    """
    by_lower = {candidate.lower(): candidate for candidate in allowed}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None
