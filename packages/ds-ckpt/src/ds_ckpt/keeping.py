"""Which checkpoints of a folder are kept, and what crashed saves and removals left there. Loads no torch.

Note: order. A checkpoint that is removed loses its manifest first, durably, then its files, then its folder: a crash in
between leaves what a crashed save leaves, files that no manifest names. Both are swept by a later save.

Note: other names. A link or a mount may lead to a folder that has another name too, or to one that is elsewhere. Links
are left alone and are not counted; what must stay is known by the folder itself, whatever name leads to it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_ckpt.checks import MAX_JSON_BYTES, parse_json
from ds_ckpt.formats import plain, sharded
from ds_ckpt.manifest import decode
from ds_core.checkpoint.folder import LATEST, MANIFEST
from ds_core.checkpoint.saving import is_ours
from ds_core.errors import CheckpointError
from ds_core.log import logger

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from ds_ckpt.storage import Folder

__all__ = ["Complete", "Keeper", "to_remove"]

LEFTOVER_AGE_S = 3600
"""A folder without manifest that was written to since may be another job's save, not finished yet."""
STORE_LEFTOVER_AGE_S = 24 * 3600
"""The same of a store: it has a clock of its own, and a large file only gets its time when all of it was put."""
_OURS_BESIDE = frozenset({MANIFEST, f"{MANIFEST}.tmp"})


@dataclass(frozen=True)
class Complete:
    """A complete checkpoint that one of our engines wrote."""

    tag: str
    step: int | None
    """``global_steps`` of its state; None where it has none."""


def to_remove(
    found: Sequence[Complete], *, keep_last: int | None, keep_every: int | None, protected: Collection[str]
) -> list[str]:
    """Return the tags to remove, oldest first. Pure.

    Args:
        found: the complete checkpoints, newest last.
        keep_last: how many of the newest are kept; None: all.
        keep_every: kept as well are those whose step is a multiple of it; None: no others.
        protected: tags that stay: what ``latest`` names, and what was just written.
    """
    if keep_last is None:
        return []
    older = found[: -max(1, keep_last)]
    return [
        each.tag
        for each in older
        if each.tag not in protected
        and not (keep_every is not None and each.step is not None and each.step % keep_every == 0)
    ]


class Keeper:
    """Applies ``keep_last`` and ``keep_every`` to a folder, and sweeps it."""

    def __init__(self, *, keep_last: int | None, keep_every: int | None) -> None:
        self.keep_last, self.keep_every = keep_last, keep_every
        self._known: dict[tuple[str, int | None], Complete | None] = {}
        self._told: set[str] = set()

    def tidy(self, directory: Folder, written: str) -> None:
        """Remove what is not kept and what crashes left, once the checkpoint ``written`` is complete.

        That save has succeeded, so nothing that goes wrong here is raised: it is logged with its reason, and what
        stays is seen by ``ds ckpt ls``, and tried again by the next save.
        """
        try:
            self._remove_old(directory, written)
            _sweep(directory, written)
        except (CheckpointError, OSError) as error:
            logger.warning("checkpoints in %s cannot be looked through to remove old ones: %s", directory, _why(error))

    def _remove_old(self, directory: Folder, written: str) -> None:
        if self.keep_last is None:
            return
        tags = [tag for tag in directory.complete_tags() if not (directory / tag).is_link()]
        places = {place: tag for tag in tags if (place := (directory / tag).identity()) is not None}
        newest = (directory / written).identity()
        if newest in places:
            # Whatever clocks say.
            places[newest] = places.pop(newest)
        found = [each for tag in places.values() if (each := self._complete(directory / tag)) is not None]
        stays = [written, *([directory.read_latest()] if directory.has(LATEST) else [])]
        protected = {places[place] for tag in stays if (place := (directory / tag).identity()) in places}
        for tag in to_remove(found, keep_last=self.keep_last, keep_every=self.keep_every, protected=protected):
            if not self._is_shared(directory / tag):
                _remove(directory / tag, "an old checkpoint")

    def _is_shared(self, folder: Folder) -> bool:
        """Return whether somebody else's things are in ``folder`` by now, or it is a link by now."""
        foreign = [name for name in folder.files() if not _is_named_like_ours(name)] + folder.folders()
        if foreign and str(folder) not in self._told:
            self._told.add(str(folder))
            logger.warning("%s is never removed, it holds %s, which no save wrote", folder, ", ".join(foreign[:3]))
        return bool(foreign) or folder.is_link()

    def _complete(self, folder: Folder) -> Complete | None:
        """Return what is in ``folder``; None where its manifest is none that one of our engines wrote."""
        key = (str(folder), folder.changed_ns(MANIFEST))
        if key not in self._known:
            self._known[key] = _read(folder)
        return self._known[key]


def _read(folder: Folder) -> Complete | None:
    try:
        data = folder.read(MANIFEST, MAX_JSON_BYTES)
        if sharded.is_sharded(data):
            state = decode(data, folder).state
        else:
            manifest = parse_json(data, folder, MANIFEST)
            if not plain.is_plain(manifest) or not isinstance(manifest.get("state"), dict):
                return None
            state = manifest["state"]
    except CheckpointError as error:
        logger.warning("%s is never removed, its manifest cannot be read: %s", folder, error.what)
        return None
    step = state.get("global_steps")
    return Complete(folder.name, step if type(step) is int else None)


def _is_named_like_ours(name: str) -> bool:
    return is_ours(name) or name in _OURS_BESIDE


def _sweep(directory: Folder, written: str) -> None:
    """Remove the folders that crashed saves and removals left, under whatever tag."""
    now_ns, age_s = time.time_ns(), LEFTOVER_AGE_S if directory.path is not None else STORE_LEFTOVER_AGE_S
    for tag in directory.folders():
        folder = directory / tag
        if tag == written or folder.is_link() or folder.has(MANIFEST):
            continue
        names = folder.files()
        if not names or folder.folders() or not all(map(_is_named_like_ours, names)):
            continue
        changed = [folder.changed_ns(name) for name in names]
        # A store's folders have no time of their own.
        changed += [at for at in [folder.changed_ns()] if at is not None]
        if all(at is not None and now_ns - at > age_s * 10**9 for at in changed):
            _remove(folder, "what a crash left")


def _remove(folder: Folder, what: str) -> None:
    try:
        if folder.has(MANIFEST):
            # From here on it is no checkpoint, so it must not be one again after a crash.
            folder.remove(MANIFEST)
            folder.sync()
        for name in folder.files():
            if _is_named_like_ours(name):
                folder.remove(name)
        folder.drop()
    except (CheckpointError, OSError) as error:
        logger.warning("%s cannot be removed: %s: %s", what, folder, _why(error))


def _why(error: CheckpointError | OSError) -> str:
    return error.what if isinstance(error, CheckpointError) else str(error.strerror or error)
