import pytest

from ds_core.precision.fp32 import Fp32
from ds_core.testing.precision import PrecisionContract


class TestFp32(PrecisionContract):
    @pytest.fixture
    def precision_class(self):
        return Fp32
