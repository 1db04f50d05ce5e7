from __future__ import annotations

import pytest

from ds_ckpt.config import ShardedConfig
from ds_ckpt.sharded import ShardedCheckpoint
from ds_core.testing.checkpoint import CheckpointEngineContract


class TestSharded(CheckpointEngineContract):
    @pytest.fixture
    def engine(self):
        return ShardedCheckpoint(None, None)


class TestShardedInManyFilesAndChunks(CheckpointEngineContract):
    @pytest.fixture
    def engine(self):
        return ShardedCheckpoint(ShardedConfig(writers=3, chunk_bytes=64), None)
