import math

import pytest
import torch

from ds_core.ops.torch_ops import TorchOps
from ds_core.testing.ops import OpsContract


def sum_of_squares(tensors):
    values = (value for tensor in tensors for value in tensor.double().reshape(-1).tolist())
    return torch.tensor(math.fsum(value * value for value in values), dtype=torch.float64)


def scale_(tensors, factor):
    for tensor in tensors:
        tensor.copy_(tensor * factor)


class TestTorchOps(OpsContract):
    """These are the reference of other providers, so they are held against plain arithmetic."""

    @pytest.fixture
    def provider_class(self):
        return TorchOps

    @pytest.fixture
    def references(self):
        return {"sum_of_squares": sum_of_squares, "scale_": scale_}

    @pytest.fixture
    def rtol(self):
        # A sum is float64, but of rows of up to 4096 elements that were added in fp32: at most 531 of its roundings,
        # the bound of its docstring. Results of scale_ are equal, whatever their dtype.
        return {torch.float64: 531 * 2**-24}
