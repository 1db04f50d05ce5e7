"""Names of DeepSpeed's files: which are there, of which rank, and which of them cannot be read. Torch-free."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ds_ckpt.checks import damaged
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Listing", "list_folder"]

_MODEL = re.compile(r"mp_rank_(\d{1,9})_model_states\.pt")
_SHARDED_MODEL = re.compile(r"zero_pp_rank_(\d{1,9})_mp_rank_(\d{1,9})_model_states\.pt")
# Old releases left out the underscore before "optim".
_OPTIMIZER = re.compile(r"(bf16_|fp16_)?zero_pp_rank_(\d{1,9})_mp_rank_(\d{1,9})_?optim_states\.pt")
_EXPERT = re.compile(r"(layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt|expp_rank_\d+_mp_rank_\d+_optim_states\.pt")
_LAYER = re.compile(r"layer_\d+-(model_\d+-)?model_states\.pt")
UNIVERSAL = "zero/optimizer_state.pt"


@dataclass
class Listing:
    """The files of one checkpoint, by the number of the rank that wrote them."""

    folder: Path
    model: str | None = None
    """The one file of weights and counters; None where every rank has one of its own."""
    models: dict[int, str] = field(default_factory=dict)
    optimizers: dict[int, str] = field(default_factory=dict)
    is_universal: bool = False

    def first_model(self) -> str:
        """Return the file with counters, buffers and client state: that of rank 0.

        Raises:
            CheckpointError: it is missing.
        """
        if self.model is not None:
            return self.model
        if 0 not in self.models:
            name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if self.models else "mp_rank_00_model_states.pt"
            raise damaged(f"the file of weights and counters is missing: {name}", self.folder)
        return self.models[0]

    def expect(self, found: Mapping[int, str], world_size: int, what: str) -> list[str]:
        """Return the files of ranks ``0..world_size-1``, in order of their numbers.

        Raises:
            CheckpointError: naming ranks whose file is missing, or files of ranks there were not.
        """
        missing = [rank for rank in range(min(world_size, len(found) + 4)) if rank not in found][:4]
        if missing:
            raise damaged(
                f"the checkpoint was written by {world_size} ranks and has {len(found)} {what} files; "
                f"missing is that of rank {', '.join(map(str, missing))}",
                self.folder,
            )
        extra = sorted(set(found) - set(range(world_size)))
        if extra:
            raise CheckpointError(
                f"the checkpoint was written by {world_size} ranks and has {len(found)} {what} files; "
                f"{found[extra[0]]} was left by an earlier save with more ranks",
                where=str(self.folder),
                fix="move the files of the earlier save away",
            )
        return [found[rank] for rank in range(world_size)]


def list_folder(folder: Path) -> Listing:
    """Return DeepSpeed's files in ``folder``; other files are ignored.

    Raises:
        CheckpointError: files of pipeline or tensor parallelism, experts or an optimizer on NVMe; or of two saves.
    """
    listing = Listing(folder)
    prefixes: set[str] = set()
    for name in _names(folder):
        if _EXPERT.fullmatch(name):
            raise _cannot(folder, f"experts of their own ({name})", "mixture-of-experts models")
        if _LAYER.fullmatch(name):
            raise _cannot(folder, f"layers of a pipeline ({name})", "pipeline parallelism")
        if name == "offloaded_tensors":
            raise _cannot(folder, f"an optimizer kept on NVMe ({name})", "optimizer state offloaded to NVMe")
        if found := _MODEL.fullmatch(name):
            _no_model_parallel(folder, name, found[1])
            listing.model = name
        elif found := _SHARDED_MODEL.fullmatch(name):
            _no_model_parallel(folder, name, found[2])
            listing.models[int(found[1])] = name
        elif found := _OPTIMIZER.fullmatch(name):
            _no_model_parallel(folder, name, found[3])
            prefixes.add(found[1] or "")
            listing.optimizers[int(found[2])] = name
    if len(prefixes) > 1 or (listing.model is not None and listing.models):
        raise CheckpointError(
            "files of two saves are mixed: " + ("in two precisions" if len(prefixes) > 1 else "of stage 3 and below"),
            where=str(folder),
            fix="move the files of one of them away",
        )
    listing.is_universal = (folder / UNIVERSAL).is_file()
    return listing


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208  names only
    except OSError as error:
        raise damaged(f"the folder cannot be read: {error.strerror}", folder) from error


def _no_model_parallel(folder: Path, name: str, rank: str) -> None:
    if int(rank):
        raise _cannot(folder, f"more than one model-parallel rank ({name})", "tensor or pipeline parallelism")


def _cannot(folder: Path, what: str, feature: str) -> CheckpointError:
    return CheckpointError(
        f"this checkpoint of DeepSpeed's has {what}; checkpoints with {feature} are not read",
        where=str(folder),
        fix="export the weights with DeepSpeed itself and load those",
    )
