"""The reference ops."""

from __future__ import annotations

import math

import pytest
import torch

from ds_core.ops.torch_ops import ROW_NUMEL, TorchOps, scale_, sum_of_squares

U = 2.0**-24
WORST = (ROW_NUMEL // 4 + 15 + 4) * U
"""Of any data, from the derivation in the docstring: 1.7e-5."""
RANDOM = 1e-6
"""Of random data. An addition errs by about u/4 of the sum so far, with either sign, so the K = 256 additions of a lane
come to u sqrt(K/3)/4 = 1.4e-7, and less over more lanes and rows. bf16 squares round alike by some 2.5e-7."""

LENGTHS = [0, 1, 63, ROW_NUMEL - 1, ROW_NUMEL, ROW_NUMEL + 1, 5 * ROW_NUMEL + 17]


def _exact(*tensors: torch.Tensor) -> float:
    return math.fsum(tensor.double().square().sum().item() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("numel", LENGTHS)
def test_of_random_numbers(numel: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(numel)
    for tensor in (
        torch.randn(numel, generator=generator).to(dtype),
        torch.rand(numel, generator=generator).to(dtype),
        (torch.randn(numel, generator=generator) * 2).exp().to(dtype),  # few of them make up the sum
    ):
        found = sum_of_squares([tensor])
        assert (found.dtype, found.shape, found.device) == (torch.float64, (), tensor.device)
        bound = 4 * 2.0**-53 * numel if dtype == torch.float64 else RANDOM
        assert found.item() == pytest.approx(_exact(tensor), rel=bound, abs=0)


def test_a_large_tensor_of_random_numbers() -> None:
    """The size at which one fp32 sum is off by 4e-4."""
    tensor = torch.randn(6_500_000, generator=torch.Generator().manual_seed(0))
    assert sum_of_squares([tensor]).item() == pytest.approx(_exact(tensor), rel=1e-7)


def test_the_worst_of_equal_numbers() -> None:
    """All errors of one sign, which happens where every addition rounds the same way."""
    values = [1 + step / 97 for step in range(97)]
    errors = [
        abs(sum_of_squares([tensor]).item() / _exact(tensor) - 1)
        for tensor in (torch.full((3 * ROW_NUMEL,), value) for value in values)
    ]
    assert max(errors) < WORST


def test_small_tensors_are_exact() -> None:
    """Less than a row is added in fp64 alone."""
    assert sum_of_squares([torch.full((3,), 2.0), torch.full((7,), 3.0, dtype=torch.bfloat16)]).item() == 75.0
    tensor = torch.randn(ROW_NUMEL - 1)
    assert sum_of_squares([tensor]).item() == pytest.approx(_exact(tensor), rel=1e-13)


def test_many_tensors_of_mixed_kinds() -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(3, 5, generator=generator),
        torch.randn(0, 7, generator=generator),
        torch.randn((), generator=generator),
        torch.randn(70, 70, generator=generator).to(torch.bfloat16),
        torch.randn(9, generator=generator).double(),
        torch.randn(90, 100, generator=generator).t(),
        torch.randn(64, 300, generator=generator)[:, ::3],
        torch.nn.Parameter(torch.randn(8, generator=generator)),
    ]
    found = sum_of_squares(tensors)
    assert not found.requires_grad
    assert found.item() == pytest.approx(_exact(*(tensor.detach() for tensor in tensors)), rel=RANDOM)


def test_of_nothing() -> None:
    for nothing in ([], [torch.zeros(0)], [torch.zeros(0, 3), torch.zeros(2, 0)]):
        found = sum_of_squares(nothing)
        assert (found.dtype, found.shape, found.item()) == (torch.float64, (), 0.0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, ROW_NUMEL, ROW_NUMEL + 5])
def test_one_element_that_is_not_finite_shows(place: int, value: float) -> None:
    tensor = torch.ones(ROW_NUMEL + 6)
    tensor[place] = value
    assert not math.isfinite(sum_of_squares([tensor]).item())


def test_fp16_squares_do_not_overflow() -> None:
    tensor = torch.full((3 * ROW_NUMEL,), 60_000.0, dtype=torch.float16)
    assert sum_of_squares([tensor]).item() == pytest.approx(_exact(tensor), rel=WORST)


def test_the_tensors_are_not_written_to() -> None:
    tensor = torch.arange(2.0 * ROW_NUMEL + 3)
    before = tensor.clone()
    sum_of_squares([tensor])
    assert torch.equal(tensor, before)


def test_scale_in_place() -> None:
    tensors = [
        torch.ones(3),
        torch.ones(2, 2, dtype=torch.bfloat16).t(),
        torch.ones(0),
        torch.nn.Parameter(torch.ones(2)),
    ]
    places = [tensor.data_ptr() for tensor in tensors]
    assert scale_(tensors, 0.5) is None
    assert [tensor.data_ptr() for tensor in tensors] == places
    assert all(bool((tensor == 0.5).all()) for tensor in tensors)
    assert tensors[0].numel() == 3


def test_scaling_by_one_touches_nothing() -> None:
    tensor = torch.ones(3)
    version = tensor._version
    scale_([tensor], 1.0)
    assert tensor._version == version
    scale_([tensor], 2.0)
    assert tensor._version > version


def test_scaling_nothing() -> None:
    scale_([], 0.5)


def test_the_provider_offers_what_it_has_on_any_device() -> None:
    provider = TorchOps()
    assert provider.ops() == {"sum_of_squares", "scale_"}
    for op in provider.ops():
        assert provider.offer(op, torch.device("cuda", 3)).usable
        assert callable(provider.implementation(op))
    with pytest.raises(KeyError):
        provider.implementation("nothing")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    tensor = torch.randn(1_000_003, device="cuda").to(dtype)
    found = sum_of_squares([tensor, tensor.new_zeros(0)])
    assert found.device == tensor.device
    assert found.item() == pytest.approx(_exact(tensor), rel=RANDOM)
    scale_([tensor], 0.5)
    assert sum_of_squares([tensor]).item() == pytest.approx(found.item() / 4, rel=1e-3)


def test_both_parts_of_a_complex_number_count():
    tensors = [torch.tensor([3 + 4j]), torch.full((3000,), 1j, dtype=torch.complex64), torch.ones(2)]
    assert sum_of_squares(tensors).item() == pytest.approx(25 + 3000 + 2)
    assert not sum_of_squares([torch.tensor([complex(0, float("inf"))])]).isfinite()
