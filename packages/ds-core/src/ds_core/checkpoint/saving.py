"""What engines share that write one folder from several ranks: an id of the save, failing together, sweeping up.

Note: names of files. Every file of a save has its id in its name, so no save ever writes over a file that a manifest
names; what no manifest names is a leftover of a save that was torn or replaced.
"""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Any, TypeVar

from ds_core.checkpoint.atomic import NotDurableError
from ds_core.checkpoint.disk_errors import fix_of
from ds_core.comm import raise_together
from ds_core.errors import CheckpointError, few
from ds_core.interfaces.logical import Chunk
from ds_core.log import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from pathlib import Path

    from torch.distributed import ProcessGroup

    from ds_core.interfaces.logical import LogicalTensor, Piece

T = TypeVar("T")

__all__ = [
    "agree_on_id",
    "chunk_key",
    "file_name",
    "gather",
    "is_ours",
    "place_in",
    "remove_leftovers",
    "together",
    "warn_of_deepspeed",
    "written_by",
]

_OURS = re.compile(r"rank_\d{5}(_\d+)?-[0-9a-f]{12}\.(safetensors(\.tmp)?|pt[^/\n]*)")
"""``.pt`` and what follows: files of an engine that was written for DeepSpeed's interface, see ``adapter.py``."""


def file_name(rank: int, save_id: str, part: int | None = None, *, suffix: str = "safetensors") -> str:
    """Return the name of a rank's file, or of one of its files.

    >>> file_name(3, "0123456789ab"), file_name(3, "0123456789ab", 1)
    ('rank_00003-0123456789ab.safetensors', 'rank_00003_1-0123456789ab.safetensors')
    """
    return f"rank_{rank:05d}{'' if part is None else f'_{part}'}-{save_id}.{suffix}"


def is_ours(name: str) -> bool:
    """Return whether a file, by its name, is one that a save wrote or left half written.

    >>> is_ours(file_name(3, "0123456789ab")), is_ours("model.safetensors")
    (True, False)
    """
    return _OURS.fullmatch(name) is not None


def chunk_key(of: LogicalTensor, chunk: Chunk) -> str:
    """Return the name of a chunk inside a file: kind and name, and where the chunk is if it is not the whole."""
    key = f"{of.kind}:{of.name}"
    if of.rank is not None:
        key += f":rank{of.rank}"
    if chunk != Chunk.whole(of.shape):
        key += f":{'_'.join(map(str, chunk.box.start))}:{chunk.offset}"
    return key


def written_by(rank: int, pieces: Sequence[Piece]) -> list[Piece]:
    """Return what ``rank`` writes, each chunk once."""
    found: dict[tuple[LogicalTensor, Chunk], Piece] = {}
    for piece in pieces:
        # A chunk without elements says nothing, unless the tensor has none at all; such a one is stored once.
        if piece.writer == rank and (piece.chunk.length or not piece.of.numel):
            found.setdefault((piece.of, piece.chunk), piece)
    return list(found.values())


def place_in(group: ProcessGroup | None) -> tuple[int, int]:
    """Return (rank, world size) in ``group``; None is one process alone."""
    # Asked of the group itself: torch.distributed.get_rank(group) needs the default group, which a script may have
    # destroyed while a save in the background goes on over a group of its own.
    return (0, 1) if group is None else (group.rank(), group.size())


def agree_on_id(group: ProcessGroup | None) -> str:
    """Return a new id of a save, the same on every rank. Collective."""
    chosen = [uuid.uuid4().hex[:12]]
    if group is not None:
        import torch.distributed as dist

        dist.broadcast_object_list(chosen, group=group, group_src=0)
    return chosen[0]


def gather(mine: T, group: ProcessGroup | None) -> list[T]:
    """Return what every rank gave, in their order, on rank 0; nothing on the others. Collective."""
    if group is None:
        return [mine]
    import torch.distributed as dist

    told: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(mine, told, group=group, group_dst=0)
    return told or []


def together(work: Callable[[], object], folder: object, group: ProcessGroup | None) -> None:
    """Run a part of a save into ``folder``; if it fails on one rank it fails on all, with that rank's reason.

    Collective. ``folder`` is for errors: a path, or what is printed as a URL.
    """
    failure: CheckpointError | None = None
    try:
        work()
    except CheckpointError as error:
        failure = error
    except NotDurableError as error:
        failure = CheckpointError(
            f"what was written is in place, but a power failure may undo it: {error.strerror or error}",
            where=str(error.filename or folder),
            fix="check the disk and save again",
        )
    except OSError as error:
        failure = CheckpointError(
            f"the checkpoint cannot be written: {error.strerror or error}",
            where=str(error.filename or folder),
            fix=f"{fix_of(error)}; what was complete before can still be loaded",
        )
    except Exception as error:
        # Whatever it is, the other ranks must hear of it: they are waiting for this one.
        failure = CheckpointError(
            f"the checkpoint cannot be written: {type(error).__name__}: {error}", where=str(folder)
        )
        failure.__cause__ = error
    raise_together(failure, group)


def remove_leftovers(folder: Path, *, keep: Collection[str]) -> None:
    """Remove what earlier saves under a tag left, and nothing of anybody else's; the new save is complete by now."""
    paths = sorted(folder.iterdir())
    warn_of_deepspeed(folder, [path.name for path in paths])
    for path in paths:
        if is_ours(path.name) and path.name not in keep:
            try:
                path.unlink()
            except OSError as error:
                logger.warning("a file of an earlier save cannot be removed: %s: %s", path, error.strerror)


def warn_of_deepspeed(folder: object, names: Iterable[str]) -> None:
    """Warn of files that DeepSpeed wrote under a tag: no save removes them, and they are not loaded any more."""
    left = sorted(name for name in names if name.endswith("_states.pt"))
    if left:
        logger.warning(
            "%s: %d files that DeepSpeed wrote are left beside the new checkpoint, which is what is loaded: %s",
            folder,
            len(left),
            few(left),
        )
