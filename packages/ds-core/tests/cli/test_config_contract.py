import pytest

from ds_core.testing.cli import SubcommandContract


class TestConfig(SubcommandContract):
    @pytest.fixture
    def name(self):
        return "config"

    @pytest.fixture
    def entry(self):
        return "ds_core.cli.config:app"

    @pytest.fixture
    def failing(self):
        return ["explain", "no-such-file.json"]
