import pytest

from ds_core.accelerator.cpu import CpuAccelerator
from ds_core.accelerator.cuda import CudaAccelerator
from ds_core.testing.accelerator import AcceleratorContract


class TestCpu(AcceleratorContract):
    @pytest.fixture
    def accelerator_class(self):
        return CpuAccelerator


class TestCuda(AcceleratorContract):
    @pytest.fixture
    def accelerator_class(self):
        return CudaAccelerator
