import pytest

from ds_core import registry
from ds_core.testing.engine import EngineContract
from ds_core.testing.state import reset_globals


class TestPlainEngine(EngineContract):
    @pytest.fixture(autouse=True)
    def _one_process(self, monkeypatch):
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        reset_globals()
        yield
        reset_globals()

    @pytest.fixture
    def provider(self):
        return registry.load("engine", "plain")()

    @pytest.fixture
    def other_model(self):
        return None
