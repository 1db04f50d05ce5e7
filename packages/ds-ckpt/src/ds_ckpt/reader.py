"""One reader for every checkpoint, without a process group or an engine: :func:`open`.

Torch is loaded when the first tensor is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ds_ckpt import formats
from ds_ckpt.checks import damaged
from ds_ckpt.loading import StoredReader
from ds_ckpt.tags import folder_of
from ds_core.checkpoint.jsonable import decode
from ds_core.checkpoint.partly import values_of
from ds_core.errors import CheckpointError, nearest
from ds_core.interfaces.logical import BUFFER, MASTER, WEIGHT, Chunk, Piece

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike
    from pathlib import Path

    import torch

    from ds_ckpt.stored import Stored, StoredTensor

__all__ = ["Checkpoint", "open"]

_INSTEAD = {
    MASTER: (MASTER, WEIGHT, BUFFER),
    WEIGHT: (WEIGHT, MASTER, BUFFER),
}
"""Kind -> the kinds that are the same values in other digits, best first."""


def open(path: str | PathLike[str], tag: str | None = None) -> Checkpoint:
    """Open a checkpoint for reading: one of ours in any format, or one that DeepSpeed wrote.

    Args:
        path: the folder with the tags, or the folder of a tag; a URL as text, such as ``s3://bucket/run``, too.
        tag: which; None: the one that ``latest`` names, or ``path`` itself where it is a checkpoint.

    Raises:
        CheckpointError: there is none, half of one, or a damaged one.
    """
    return Checkpoint(formats.read(folder_of(path, tag)))


class Checkpoint:
    """An open checkpoint. Tensors are read, and their checksums checked, when they are asked for."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self._reader = StoredReader(stored)
        self._decoded: Mapping[str, Any] | None = None

    @property
    def path(self) -> Path | str:
        """The folder of the tag; text where it is a URL."""
        return self.stored.folder.path or str(self.stored.folder)

    @property
    def world_size(self) -> int:
        """How many ranks wrote it."""
        return self.stored.world_size

    def names(self) -> list[str]:
        """Return the names of all parameters and buffers, in the order they were saved in.

        A parameter with several names is there once, under the first.
        """
        return list(dict.fromkeys(name for name, _, _ in self.stored.tensors))

    def kinds(self, name: str) -> list[str]:
        """Return what is stored of ``name``: ``weight``, ``master``, ``buffer``, ``exp_avg``, ...

        Args:
            name: of the parameter or buffer; of a parameter with several names, any of them.

        Raises:
            CheckpointError: there is no such name.
        """
        name = self._stored_name(name)
        found = list(dict.fromkeys(kind for stored, kind, _ in self.stored.tensors if stored == name))
        if not found:
            close = nearest(name, self.names())
            raise CheckpointError(
                f"the checkpoint has no tensor {name!r}",
                where=str(self.path),
                fix=f"did you mean {close!r}?" if close else "names() lists what there is",
            )
        return found

    def tensor(self, name: str, kind: str = MASTER, *, rank: int | None = None) -> torch.Tensor:
        """Return a tensor whole, on the CPU, in the dtype it is stored in; a new one each time.

        Args:
            name: of the parameter or buffer; of a parameter with several names, any of them.
            kind: one of :meth:`kinds`. A master is the weight before it was cast, so where one of ``master`` and
                ``weight`` is missing the other is returned; for a buffer, both are the buffer.
            rank: whose, for a gradient that every rank has its own part of.

        Raises:
            CheckpointError: there is none; or its bytes are not those that were written, naming the file.
        """
        import torch

        of = self._find(self._stored_name(name), kind, rank).of
        try:
            data = torch.empty(of.shape, dtype=getattr(torch, of.dtype))
        except (MemoryError, RuntimeError) as error:
            # A file with holes may truly have 10^15 bytes.
            raise CheckpointError(
                f"{of.kind} {of.name!r} of {list(of.shape)} elements of {of.dtype} does not fit into memory",
                where=str(self.path),
                fix="read it on a machine with more memory",
            ) from error
        self._reader.read([Piece(of, Chunk.whole(of.shape), data)])
        return data

    @property
    def state(self) -> Mapping[str, Any]:
        """What was saved beside tensors: counters, schedule, scaler, options of the optimizer, ``client_state``."""
        if self._decoded is None:
            try:
                self._decoded = cast("Mapping[str, Any]", decode(dict(self.stored.state)))
            except Exception as error:
                # Whatever a value that is not what it says makes of numbers, dtypes and shapes.
                raise damaged(
                    f"the state cannot be read: {type(error).__name__}: {error}", self.stored.folder
                ) from error
        return self._decoded

    @property
    def client_state(self) -> dict[str, Any]:
        """What the caller of ``save_checkpoint`` gave; a value that cannot be read is missed when it is asked for."""
        return cast("dict[str, Any]", values_of(self.state, "client_state"))

    def close(self) -> None:
        """Let go of all files."""
        self._reader.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.stored.format} checkpoint {str(self.path)!r}, {len(self.stored.tensors)} tensors>"

    def _stored_name(self, name: str) -> str:
        """Return the name that what ``name`` means is stored under."""
        if any(stored == name for stored, _, _ in self.stored.tensors):
            return name
        from ds_ckpt.weights import shared_names

        return shared_names(self.stored).get(name, name)

    def _find(self, name: str, kind: str, rank: int | None) -> StoredTensor:
        for instead in _INSTEAD.get(kind, (kind,)):
            if (name, instead, rank) in self.stored.tensors:
                return self.stored.tensors[name, instead, rank]
        ranks = [str(r) for stored, k, r in self.stored.tensors if (stored, k) == (name, kind) and r is not None]
        if ranks:
            raise CheckpointError(
                f"{name!r} has a {kind} of each rank" + ("" if rank is None else f", and none of rank {rank}"),
                where=str(self.path),
                fix=f"pass rank=, one of {', '.join(ranks)}",
            )
        raise CheckpointError(
            f"{name!r} has no {kind!r} in the checkpoint",
            where=str(self.path),
            fix=f"pass kind=, one of {', '.join(self.kinds(name))}",
        )
