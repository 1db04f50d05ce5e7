"""Contract of the seam ``accelerator``; inherit :class:`AcceleratorContract` in a plugin's tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from ds_core.interfaces.accelerator import Accelerator

__all__ = ["AcceleratorContract"]

BYTES = 64 * 2**20


class AcceleratorContract:
    """What every accelerator promises; all but the first test are skipped where it has no device."""

    @pytest.fixture
    def accelerator_class(self) -> type[Accelerator]:
        """Override: the class under test."""
        raise NotImplementedError

    @pytest.fixture
    def accelerator(self, accelerator_class: type[Accelerator]) -> Accelerator:
        accelerator = accelerator_class()
        if not accelerator.is_available():
            pytest.skip(f"{accelerator_class.__name__} has no device here")
        return accelerator

    def test_availability_can_always_be_asked(self, accelerator_class: type[Accelerator]) -> None:
        accelerator = accelerator_class()
        assert isinstance(accelerator.is_available(), bool)
        assert accelerator.is_available() == accelerator_class().is_available()

    def test_devices_have_names(self, accelerator: Accelerator) -> None:
        kind = accelerator.device_name()
        assert kind
        assert ":" not in kind
        assert accelerator.device() == torch.device(kind)
        assert accelerator.device_count() >= 1
        for index in range(accelerator.device_count()):
            assert accelerator.device_name(index) == str(accelerator.device(index))
            assert accelerator.device(index).type == torch.device(kind).type

    def test_the_device_set_is_the_current_one(self, accelerator: Accelerator) -> None:
        before = accelerator.current_device()
        assert 0 <= before < accelerator.device_count()
        for index in range(accelerator.device_count()):
            accelerator.set_device(index)
            assert accelerator.current_device() == index
            assert torch.empty(1, device=accelerator.device()).device in (
                accelerator.device(),
                accelerator.device(index),
            )
        accelerator.set_device(before)

    def test_synchronize_waits_for_any_device(self, accelerator: Accelerator) -> None:
        result = torch.ones(100, 100, device=accelerator.device()) @ torch.ones(100, 100, device=accelerator.device())
        accelerator.synchronize()
        accelerator.synchronize(accelerator.current_device())
        assert result.sum().item() == 100**3

    def test_the_backend_is_one_of_torch_distributed(self, accelerator: Accelerator) -> None:
        backend = accelerator.communication_backend_name()
        assert torch.distributed.is_backend_available(backend)

    def test_a_model_trains_in_every_dtype_supported(self, accelerator: Accelerator) -> None:
        dtypes = accelerator.supported_dtypes()
        assert torch.float32 in dtypes
        assert len(dtypes) == len(set(dtypes))
        for dtype in dtypes:
            assert dtype.is_floating_point
            layer = torch.nn.Linear(4, 2).to(accelerator.device(), dtype)
            layer(torch.ones(3, 4, device=accelerator.device(), dtype=dtype)).sum().backward()
            assert layer.weight.grad is not None
            assert torch.equal(layer.weight.grad, torch.full_like(layer.weight, 3.0))

    def test_the_shorthands_agree_with_the_list(self, accelerator: Accelerator) -> None:
        assert accelerator.is_bf16_supported() == (torch.bfloat16 in accelerator.supported_dtypes())
        assert accelerator.is_fp16_supported() == (torch.float16 in accelerator.supported_dtypes())

    def test_memory_figures_follow_a_tensor(self, accelerator: Accelerator) -> None:
        accelerator.synchronize()
        accelerator.reset_peak_memory_stats()
        before = accelerator.memory_allocated()
        held = torch.ones(BYTES // 4, device=accelerator.device())
        # Resident bytes also move for reasons of the system's, so half of it is enough.
        assert accelerator.memory_allocated() >= before + BYTES // 2
        assert accelerator.max_memory_allocated() >= accelerator.memory_allocated() - BYTES // 2
        assert accelerator.total_memory() > accelerator.memory_allocated() > 0
        assert held[-1].item() == 1.0
        del held
        assert accelerator.max_memory_allocated() >= before + BYTES // 2, "the peak outlives the tensor"
        index = accelerator.current_device()
        assert accelerator.memory_allocated(index) >= 0
        assert accelerator.max_memory_allocated(index) > 0
        assert accelerator.total_memory(index) == accelerator.total_memory()
