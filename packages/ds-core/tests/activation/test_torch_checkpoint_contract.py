import pytest

from ds_core.activation.torch_checkpoint import TorchActivation
from ds_core.testing.activation import ActivationContract


class TestTorchActivation(ActivationContract):
    @pytest.fixture
    def activation(self):
        return TorchActivation()
