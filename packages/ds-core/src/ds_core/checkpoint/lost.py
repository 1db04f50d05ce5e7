"""A rank that is gone in the midst of a save: what torch says of it becomes an error of the save."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from ds_core.errors import CheckpointError, CommError, DsError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["telling_of_lost_ranks"]


@contextlib.contextmanager
def telling_of_lost_ranks(folder: object) -> Iterator[None]:
    """Raise a CheckpointError where a collective of the save inside finds that a rank is gone.

    For what engines do between themselves: :func:`ds_core.checkpoint.saving.together` makes every other error of a
    save a CheckpointError. ``folder``: where it goes, for the error.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, DsError) and not isinstance(error, CommError):
            raise
        raise CheckpointError(
            f"the ranks lost each other while the checkpoint was being written: {str(error).splitlines()[0]}",
            where=str(folder),
            fix="see why a rank ended; what was complete before can still be loaded",
        ) from error
