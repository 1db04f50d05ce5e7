import pytest

from ds_core.optim.adam import adam, adamw
from ds_core.testing.optimizer import OptimizerContract


class TestAdam(OptimizerContract):
    @pytest.fixture
    def factory(self):
        return adam


class TestAdamWithL2(OptimizerContract):
    @pytest.fixture
    def factory(self):
        return adam

    @pytest.fixture
    def params(self):
        return {"lr": 0.01, "adam_w_mode": False, "amsgrad": True}


class TestAdamW(OptimizerContract):
    @pytest.fixture
    def factory(self):
        return adamw

    @pytest.fixture
    def params(self):
        return {"lr": 0.01, "betas": [0.8, 0.99], "eps": 1e-6}
