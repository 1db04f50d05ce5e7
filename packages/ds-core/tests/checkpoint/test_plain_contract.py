import pytest

from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.testing.checkpoint import CheckpointEngineContract


class TestPlain(CheckpointEngineContract):
    @pytest.fixture
    def engine(self):
        return PlainCheckpoint(None, None)
