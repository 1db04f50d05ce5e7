"""What benchmarks of checkpoints store, and everybody who can store it: us, torch.save, DCP, and one plain file.

Note: the state
    ``tensors`` fp32 matrices of equal size, each cut by rows into one part per rank, as a sharded optimizer holds them.
    Every contender of a row moves the same bytes from and to the same files' worth of disk, and syncs them.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ds_core.interfaces.logical import Box, Chunk, LogicalTensor, Piece, Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from _ranks import Ranks

    from ds_core.interfaces.checkpoint import CheckpointEngine

__all__ = ["DiskRanks", "Shards", "dcp_save", "plain_write", "read_files", "sync_file", "torch_load", "torch_save"]

ROWS = 480
"""Divided by 1, 2, 3, 4, 5, 6, 8, so that every world cuts the same tensors into parts of whole rows."""
TENSORS = 64
TAG = "tag"


@dataclass
class Shards:
    """What one of ``world_size`` ranks holds."""

    parts: list[torch.Tensor]
    """Of tensor i: ``[ROWS / world_size, columns]``, fp32, this rank's rows."""
    rank: int
    world_size: int

    @classmethod
    def make(cls, total_bytes: int, ranks: Ranks) -> Shards:
        """Return this rank's part of ``total_bytes`` of state, on its device, the memory touched."""
        columns = max(1, total_bytes // (4 * ROWS * TENSORS))
        torch.manual_seed(ranks.rank)
        parts = [torch.randn(ROWS // ranks.world_size, columns, device=ranks.device) for _ in range(TENSORS)]
        return cls(parts, ranks.rank, ranks.world_size)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def pieces(self) -> list[Piece]:
        """Return them as pieces of logical tensors."""
        rows = ROWS // self.world_size
        found = []
        for index, part in enumerate(self.parts):
            of = LogicalTensor(f"layer.{index}.weight", "exp_avg", (ROWS, part.shape[1]), "float32")
            box = Box((self.rank * rows, 0), tuple(part.shape))
            # A flat interval of the whole tensor, as a sharded optimizer describes its part.
            whole = Chunk.whole(of.shape).box
            chunk = Chunk(whole, box.start[0] * part.shape[1], part.numel())
            found.append(Piece(of, chunk, part, writer=self.rank))
        return found

    def by_name(self) -> dict[str, torch.Tensor]:
        return {f"layer.{index}.weight": part for index, part in enumerate(self.parts)}

    def as_dtensors(self) -> dict[str, torch.Tensor]:
        """Return them in the form in which DCP knows that ranks hold parts of one tensor."""
        if self.world_size == 1:
            return self.by_name()
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = init_device_mesh(self.parts[0].device.type, (self.world_size,))
        return {name: DTensor.from_local(part, mesh, [Shard(0)]) for name, part in self.by_name().items()}

    def save(self, engine: CheckpointEngine, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        engine.save(folder, TAG, Snapshot(self.pieces(), {}, {}), latest=True)

    def load(self, engine: CheckpointEngine, folder: Path) -> None:
        """Fill them from ``folder``, whoever wrote it."""
        with engine.open(folder, TAG) as reader:
            reader.read(self.pieces())


class DiskRanks:
    """Ranks that start each turn with a disk that has nothing left to write and no files of the turn before."""

    def __init__(self, ranks: Ranks, folder: Path, *, before: Callable[[], object] = lambda: None) -> None:
        self._ranks, self._folder, self._before = ranks, folder, before

    def align(self) -> None:
        self._before()
        self._ranks.align()
        if self._ranks.rank == 0:
            for left in self._folder.glob("turn-*"):
                shutil.rmtree(left)
            os.sync()
        self._ranks.align()

    def finish(self) -> None:
        self._ranks.finish()

    def slowest(self, seconds: float) -> float:
        return self._ranks.slowest(seconds)


def sync_file(path: Path) -> None:
    """Return once what was written to ``path`` is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain_write(shards: Shards, folder: Path) -> None:
    """Write the bytes one after another to one file per rank, and sync it: what any save must do at least."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank{shards.rank}").open("wb", buffering=0) as file:
        for part in shards.parts:
            data = memoryview(part.cpu().view(-1).view(torch.uint8).numpy())
            while data:
                data = data[file.write(data) :]
        os.fsync(file.fileno())
    _wait()


def torch_save(shards: Shards, folder: Path) -> None:
    """``torch.save`` of each rank's part, synced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank{shards.rank}.pt"
    torch.save(shards.by_name(), path)
    sync_file(path)
    _wait()


def torch_load(shards: Shards, folder: Path) -> dict[str, torch.Tensor]:
    """``torch.load`` of each rank's part: into new memory, on the device it is wanted on."""
    path, device = folder / f"rank{shards.rank}.pt", shards.parts[0].device
    found: dict[str, torch.Tensor] = torch.load(path, mmap=False, weights_only=True, map_location=device)
    return found


def dcp_save(state: dict[str, Any], folder: Path) -> None:
    """``torch.distributed.checkpoint.save``, which syncs its files by default."""
    import torch.distributed.checkpoint as dcp

    alone = dist.get_world_size() == 1
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, sync_files=True), no_dist=alone)


def read_files(paths: Sequence[Path], buffer: bytearray) -> None:
    """Read ``paths`` to their ends, a block at a time."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _wait() -> None:
    # A checkpoint is there when all have written; ours and DCP's know it when they return.
    dist.barrier()
