"""DeepSpeed's own interface of a checkpoint engine (``deepspeed.runtime.checkpoint_engine``): it stores *files*.

The seam ``checkpoint`` stores logical tensors. An engine written for this interface becomes an entry of the seam by
:mod:`ds_core.checkpoint.adapter`; the other way round ``engine.checkpoint_engine`` is a :class:`TorchFiles`, for
scripts that call it. Loads no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_core.checkpoint.atomic import written_beside
from ds_core.checkpoint.local import local_path
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

__all__ = ["CheckpointCommitInfo", "CheckpointEngine", "TorchFiles"]


@dataclass
class CheckpointCommitInfo:
    """Which checkpoint is begun or ended."""

    tag: str
    save_dir: str
    save_latest: bool


class CheckpointEngine(ABC):
    """Stores the files of a checkpoint; each rank has one. Names and meaning are DeepSpeed's."""

    def __init__(self, config_params: Any = None) -> None:
        self.config_params = config_params

    @abstractmethod
    def create(self, info: CheckpointCommitInfo) -> None:
        """Called once, on every rank, before the first file of a tag."""

    @abstractmethod
    def save(self, state_dict: Any, path: str) -> None:
        """Persist one file; it may still be being written on return."""

    @abstractmethod
    def load(self, path: str, map_location: Any = None) -> Any:
        """Return what was saved as ``path``."""

    @abstractmethod
    def commit(self, info: CheckpointCommitInfo | None) -> bool:
        """Return whether all files of the tag are complete, having waited for them."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder, and those it is in."""
        Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Return whether this rank writes what every data-parallel rank holds."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Return whether files are written after :meth:`save`, and :meth:`commit` is called later than right after."""
        return False

    def set_commit_info(self, info: CheckpointCommitInfo) -> None:
        """Remember what a later :meth:`commit` is for; only of a decoupled engine."""
        return

    def get_commit_info(self) -> CheckpointCommitInfo | None:
        """Return what :meth:`commit` is to be called with, None where nothing is to be committed."""
        return None

    def cleanup(self) -> None:
        """End what runs in the background; from ``engine.destroy()``."""
        return

    def preserves_storage_sharing(self) -> bool:
        """Return whether a tensor that is a small view is saved with all of its storage, as ``torch.save`` does."""
        return True


class TorchFiles(CheckpointEngine):
    """``engine.checkpoint_engine``: single files by ``torch.save``, and the commit of the engine's own checkpoints.

    A file is whole or absent, and durable once ``save`` returns. Loading unpickles nothing but tensors and plain
    values.

    Args:
        commit: waits until what ``engine.save_checkpoint`` saved is durable and visible.
    """

    def __init__(self, commit: Callable[[], None], config_params: Any = None) -> None:
        super().__init__(config_params)
        self._commit = commit

    def create(self, info: CheckpointCommitInfo | None = None) -> None:
        return

    def makedirs(self, path: str | PathLike[str], exist_ok: bool = False) -> None:
        """Make a folder of this machine, and those it is in."""
        local_path(path, "checkpoint_engine.makedirs(path)").mkdir(parents=True, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str | PathLike[str]) -> None:
        """Write ``state_dict`` to ``path`` with ``torch.save``.

        Raises:
            CheckpointError: it cannot be written; what was there before is still there.
        """
        import torch

        place = local_path(path, "checkpoint_engine.save(path)")
        try:
            with written_beside(place) as file:
                torch.save(state_dict, file)
        except OSError as error:
            raise CheckpointError(
                f"the file cannot be written: {error.strerror or error}",
                where=str(path),
                fix="free space or choose another folder; engine.checkpoint_engine.makedirs(folder) makes one",
            ) from error

    def load(self, path: str | PathLike[str], map_location: Any = None) -> Any:
        """Return what ``path`` holds: tensors and plain values, nothing else is unpickled.

        Raises:
            CheckpointError: it is missing, damaged, or holds something else.
        """
        import pickle

        import torch

        place = local_path(path, "checkpoint_engine.load(path)")
        try:
            return torch.load(place, map_location=map_location, weights_only=True)
        except FileNotFoundError:
            raise CheckpointError("there is no such file", where=str(path), fix="check the path") from None
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"the file is damaged, or holds more than tensors and plain values: {str(error).splitlines()[0]}",
                where=str(path),
                fix="torch.load(path, weights_only=False) runs what is in it: only where you know who wrote it",
            ) from error
        except (OSError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"the file cannot be read: {error}", where=str(path)) from error

    def commit(self, info: CheckpointCommitInfo | None = None) -> bool:
        """Wait until every checkpoint of the engine is durable and visible; every rank calls it.

        Raises:
            CheckpointError: on every rank: a save in the background failed.
        """
        self._commit()
        return True
