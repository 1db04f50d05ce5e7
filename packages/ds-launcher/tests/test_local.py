import pytest

from ds_core.testing.runner import RunnerContract
from ds_launcher.local import LocalRunner


class TestLocalRunner(RunnerContract):
    @pytest.fixture
    def runner(self):
        return LocalRunner(grace_s=1.0)
