import pytest

from ds_core.schedules.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR
from ds_core.testing.scheduler import SchedulerContract


class TestWarmupLR(SchedulerContract):
    @pytest.fixture
    def factory(self):
        return WarmupLR

    @pytest.fixture
    def params(self):
        return {"warmup_min_lr": 0.01, "warmup_max_lr": [0.2, 0.3], "warmup_num_steps": 8}

    @pytest.fixture
    def bad_params(self):
        return {"warmup_num_steps": 0, "warmup_type": "cubic", "warmup_max_lr": [0.1] * 7}

    def test_every_group_has_a_rate(self, factory, params):
        super().test_every_group_has_a_rate(factory, {**params, "warmup_max_lr": 0.2})


class TestWarmupDecayLR(SchedulerContract):
    @pytest.fixture
    def factory(self):
        return WarmupDecayLR

    @pytest.fixture
    def params(self):
        return {"total_num_steps": 10, "warmup_num_steps": 4, "warmup_type": "linear"}

    @pytest.fixture
    def bad_params(self):
        return {"total_num_steps": 0, "warmup_min_lr": "low"}


class TestWarmupCosineLR(SchedulerContract):
    @pytest.fixture
    def factory(self):
        return WarmupCosineLR

    @pytest.fixture
    def params(self):
        return {"total_num_steps": 10, "warmup_num_steps": 4, "cos_min_ratio": 0.1}

    @pytest.fixture
    def bad_params(self):
        return {"total_num_steps": -1, "cos_min_ratio": float("nan")}
