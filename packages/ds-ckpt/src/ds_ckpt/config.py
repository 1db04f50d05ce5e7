"""Options of the checkpoint engines of this package."""

from __future__ import annotations

from ds_core.config import PositiveInt, Section

__all__ = ["AsyncConfig", "ShardedConfig"]


class ShardedConfig(Section):
    """Options of the engine ``sharded``: ``checkpoint.sharded``."""

    source = "P11"

    writers: PositiveInt = 2
    """Threads of a rank that write at the same time, each a file of its own; a rank with little to write uses fewer."""
    chunk_bytes: PositiveInt = 64 * 2**20
    """Most bytes that share one checksum: a reader that needs a part of them reads and checks them all."""


class AsyncConfig(ShardedConfig):
    """Options of the engine ``async``: ``checkpoint.async``; those of ``sharded``, which writes its files."""
