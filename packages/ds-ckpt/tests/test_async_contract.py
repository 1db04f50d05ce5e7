from __future__ import annotations

import pytest

from ds_ckpt.background import AsyncCheckpoint
from ds_ckpt.config import AsyncConfig
from ds_core.testing.checkpoint import CheckpointEngineContract


class TestAsync(CheckpointEngineContract):
    @pytest.fixture
    def engine(self):
        return AsyncCheckpoint(None, None)


class TestAsyncInManyFilesAndChunks(CheckpointEngineContract):
    @pytest.fixture
    def engine(self):
        return AsyncCheckpoint(AsyncConfig(writers=3, chunk_bytes=64), None)
