import pytest

from ds_core.testing.cli import SubcommandContract


class TestReport(SubcommandContract):
    @pytest.fixture
    def name(self):
        return "report"

    @pytest.fixture
    def entry(self):
        return "ds_core.cli.report:app"
