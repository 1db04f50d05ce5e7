"""The errors users see: what was wrong, where, and how to fix it.

Torch-free. Every error a ``ds-*`` package raises for a user's mistake derives from :class:`DsError`;
``assert`` is left for what only our own bug can break.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
    "NoCheckpointError",
    "NotBuiltError",
    "PluginError",
    "few",
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


class NoCheckpointError(CheckpointError):
    """No checkpoint is in a folder, or there is no such folder: a job that is to go on from one starts anew."""


class LossScaleError(DsError, ArithmeticError):
    """Gradients overflow at the smallest loss scale allowed; lowering it further is not."""


class CommError(DsError, RuntimeError):
    """Ranks disagree, or one of them is gone."""


class LaunchError(DsError, RuntimeError):
    """The ranks of a job cannot be started."""


def few(names: Sequence[str], most: int = 5) -> str:
    """Return names for a message, the first ones of many.

    >>> few(["a", "b", "c"], most=2), few(["a"]), few([])
    ("'a', 'b' and 1 more", "'a'", 'nothing')
    """
    shown = ", ".join(map(repr, names[:most])) or "nothing"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed word that ``word`` was most likely meant to be, ignoring case, or None if there is none.

    >>> nearest("zero_optimisation", ["optimizer", "zero_optimization"])
    'zero_optimization'
    >>> nearest("msamp", ["amp"]) is None
    True
    """
    by_lower = {candidate.lower(): candidate for candidate in allowed}
    written = word.lower()
    close = difflib.get_close_matches(written, list(by_lower), n=5, cutoff=0.6)
    found = [name for name in close if _is_slip(written, name)]
    if written and not found:
        found = sorted((name for name in by_lower if name.startswith(f"{written}_")), key=len)
        endings = [name for name in by_lower if name.endswith(f"_{written}")]
        found += endings if len(endings) == 1 else []
    return by_lower[found[0]] if found else None


def _is_slip(written: str, meant: str) -> bool:
    """Return whether ``written`` is how people get ``meant`` wrong; of short words, many are merely alike."""
    if difflib.SequenceMatcher(None, meant, written).ratio() >= 0.8:
        return True
    if len(written) == len(meant):  # one letter, or the order of two
        differing = sum(left != right for left, right in zip(written, meant, strict=True))
        return (differing == 1 and len(meant) > 3) or (differing == 2 and sorted(written) == sorted(meant))
    # Words left out or added: "grad_dtype" for "grad_accum_dtype".
    words, of_meant = set(written.strip("_").split("_")), set(meant.split("_"))
    if words <= of_meant or of_meant <= words:
        return not written.startswith("_")
    # Words cut short: "grad_clip" for "gradient_clipping".
    letters = iter(meant)
    return written[:1] == meant[:1] and all(letter in letters for letter in written)
