"""The contract of the seam, for every way to choose one of the three precisions."""

from __future__ import annotations

import pytest

from ds_core.testing.precision import PrecisionContract
from ds_fp16 import Bf16, Fp16, TorchAutocast


class TestFp16Dynamic(PrecisionContract):
    @pytest.fixture
    def precision_class(self):
        return Fp16

    @pytest.fixture
    def config_data(self):
        return {"fp16": {"enabled": True}}


class TestFp16DynamicThatGrows(TestFp16Dynamic):
    @pytest.fixture
    def config_data(self):
        settings = {"initial_scale_power": 30, "loss_scale_window": 1, "hysteresis": 4, "consecutive_hysteresis": True}
        return {"fp16": {"enabled": True, **settings}}


class TestFp16Static(TestFp16Dynamic):
    @pytest.fixture
    def config_data(self):
        return {"fp16": {"enabled": True, "loss_scale": 128}}


class TestFp16WithAutocast(TestFp16Dynamic):
    @pytest.fixture
    def config_data(self):
        return {"fp16": {"enabled": True}, "torch_autocast": {"enabled": True, "dtype": "fp16"}}


class TestBf16(PrecisionContract):
    @pytest.fixture
    def precision_class(self):
        return Bf16

    @pytest.fixture
    def config_data(self):
        return {"bf16": {"enabled": True}}


class TestBf16WithoutCheck(TestBf16):
    @pytest.fixture
    def config_data(self):
        return {"bf16": {"enabled": True, "check_grad_overflow": False}}


class TestBf16WithAutocast(TestBf16):
    @pytest.fixture
    def config_data(self):
        return {"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}}


class TestAutocastBf16(PrecisionContract):
    @pytest.fixture
    def precision_class(self):
        return TorchAutocast

    @pytest.fixture
    def config_data(self):
        return {"torch_autocast": {"enabled": True}}


class TestAutocastFp16(TestAutocastBf16):
    @pytest.fixture
    def config_data(self):
        return {"torch_autocast": {"enabled": True, "dtype": "float16"}}
