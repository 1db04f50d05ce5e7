"""Options of the checkpoint engines of this package."""

from __future__ import annotations

from pydantic import model_validator

from ds_core.config import PositiveInt, Section

__all__ = ["AsyncConfig", "ShardedConfig"]


class ShardedConfig(Section):
    """Options of the engine ``sharded``: ``checkpoint.sharded``."""

    source = "P11"

    writers: PositiveInt = 2
    """Threads of a rank that write at the same time, each a file of its own; a rank with little to write uses fewer."""
    chunk_bytes: PositiveInt = 64 * 2**20
    """Most bytes that share one checksum: a reader that needs a part of them reads and checks them all."""
    keep_last: PositiveInt | None = None
    """How many checkpoints of the folder are kept, the newest; older ones are removed once a save is complete, but for
    the one that `latest` names. Null: all."""
    keep_every: PositiveInt | None = None
    """Beside the newest, those whose step is a multiple of this are kept, too. Null: no others."""

    @model_validator(mode="after")
    def _keeps_something(self) -> ShardedConfig:
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError("keep_every has no effect without keep_last, as all are kept; set keep_last")
        return self


class AsyncConfig(ShardedConfig):
    """Options of the engine ``async``: ``checkpoint.async``; those of ``sharded``, which writes its files."""
