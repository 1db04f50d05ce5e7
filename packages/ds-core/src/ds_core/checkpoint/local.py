"""Places on this machine, for what is never written to a store. Loads no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ds_core.checkpoint.folder import is_url
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["local_path", "refuse_lost_slash"]

_WAS_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(given: str | PathLike[str], where: str) -> Path:
    """Return ``given`` as a path of this machine.

    Args:
        given: what a user passed.
        where: as what, for errors.

    Raises:
        CheckpointError: it is empty, no path, or a URL: kept in a folder called ``s3:`` it would be gone with the
            machine.
    """
    if is_url(given):
        raise CheckpointError(
            f"only paths of this machine can be given here, and no URL such as {str(given).partition('://')[0]}://...",
            where=where,
            fix="pass a path, and copy what is there to the store",
        )
    if not given:
        raise CheckpointError("no path was given", where=where, fix="pass a path")
    try:
        path = Path(given)
    except TypeError as error:
        raise CheckpointError(f"{given!r} is no path", where=where, fix="pass text or a pathlib.Path") from error
    refuse_lost_slash(given, path, where)
    return path


def refuse_lost_slash(given: object, path: Path, where: str) -> None:
    """Raise where ``path`` was made of a URL before it was given."""
    if not isinstance(given, str) and _WAS_URL.match(str(path)) and not Path(path.parts[0]).exists():
        # Silently kept in a folder called 's3:' of this machine, it would be gone with the machine.
        raise CheckpointError(
            f"the path {str(path)!r} was made of a URL, and lost one of its slashes", where=where, fix="pass it as text"
        )
