"""Seeds of a model-parallel group."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ds_activation import settings
from ds_activation.rng import get_cuda_rng_tracker
from ds_activation.seeding import model_parallel_cuda_manual_seed, model_parallel_reconfigure_tp_seed
from ds_core.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    settings.forget()
    get_cuda_rng_tracker().reset()


def mpu(rank: int) -> Any:
    return SimpleNamespace(
        get_model_parallel_rank=lambda: rank,
        get_model_parallel_world_size=lambda: 4,
        get_model_parallel_group=lambda: None,
        get_data_parallel_rank=lambda: 0,
    )


def drawn(seed: int) -> torch.Tensor:
    return torch.rand(3, generator=torch.Generator().manual_seed(seed))


def test_one_seed_for_all_and_one_of_its_own() -> None:
    for rank in (0, 3):
        settings.configure(mpu(rank))
        get_cuda_rng_tracker().add("old", 1)
        model_parallel_cuda_manual_seed(10)
        with get_cuda_rng_tracker().fork():
            assert torch.equal(torch.rand(3), drawn(10 + 2718 + rank))
        assert torch.equal(torch.rand(3), drawn(10))
        assert list(get_cuda_rng_tracker().states_) == ["model-parallel-rng"]
        model_parallel_reconfigure_tp_seed(20)
        with get_cuda_rng_tracker().fork():
            assert torch.equal(torch.rand(3), drawn(20 + 2718 + rank))
        model_parallel_reconfigure_tp_seed(20)  # the same seed again is no mistake


@pytest.mark.parametrize("rank", ["0", "1"])
def test_without_an_mpu_every_rank_is_told(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    before = torch.get_rng_state()
    with pytest.raises(EngineError, match=r"call checkpointing\.configure\(mpu\) first"):
        model_parallel_cuda_manual_seed(10)
    assert torch.equal(torch.get_rng_state(), before)


def test_there_must_be_a_state_to_seed_anew() -> None:
    with pytest.raises(EngineError, match="model_parallel_cuda_manual_seed"):
        model_parallel_reconfigure_tp_seed(1)
