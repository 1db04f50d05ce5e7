"""Contract of the seam ``engine``; inherit :class:`EngineContract` in a plugin's tests."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ds_core.config import load_config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ds_core.interfaces.engine import EngineProvider

__all__ = ["EngineContract"]


class EngineContract:
    """What every provider of an engine promises."""

    @pytest.fixture
    def provider(self) -> EngineProvider:
        """Override: the instance under test."""
        raise NotImplementedError

    @pytest.fixture
    def model(self) -> nn.Module:
        """Override if needed: a model that it takes."""
        torch.manual_seed(0)
        return nn.Linear(3, 1)

    @pytest.fixture
    def other_model(self) -> nn.Module | None:
        """Override: a model for the plain engine; None if it takes all."""
        return nn.Linear(3, 1)

    @pytest.fixture
    def config_data(self) -> Mapping[str, Any]:
        """Override if needed: a configuration under which it takes the model, with an optimizer and a schedule."""
        return {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_min_lr": 0.001}},
        }

    @pytest.fixture
    def engine(self, provider: EngineProvider, model: nn.Module, config_data: Mapping[str, Any]) -> Iterator[Any]:
        engine = _build(provider, model, config_data)
        yield engine
        engine.destroy()

    def train(self, engine: Any) -> float:
        """Override if the engine is trained in another way: one optimizer step; return its loss."""
        loss = engine(torch.ones(2, 3)).square().mean()
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    def test_matching_only_looks(
        self, provider: EngineProvider, model: nn.Module, config_data: Mapping[str, Any], other_model: nn.Module | None
    ) -> None:
        config = load_config(config_data)
        before = copy.deepcopy(model.state_dict())
        assert provider.matches(model, config) is True
        assert provider.matches(model, config) is True
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not torch.distributed.is_initialized()
        if other_model is not None:
            assert provider.matches(other_model, config) is False

    def test_the_engine_has_its_parts(self, engine: Any) -> None:
        assert isinstance(engine.optimizer.param_groups, list)
        assert engine.lr_scheduler.get_last_lr() == [group["lr"] for group in engine.optimizer.param_groups]
        assert engine.training_dataloader is None

    def test_it_trains(self, engine: Any) -> None:
        losses = [self.train(engine) for _ in range(10)]
        assert losses[-1] < losses[0]

    def test_parts_not_asked_for_are_none(self, provider: EngineProvider, model: nn.Module) -> None:
        engine = _build(provider, model, {"train_micro_batch_size_per_gpu": 2})
        assert engine.optimizer is None
        assert engine.lr_scheduler is None
        engine.destroy()

    def test_data_gives_a_loader(
        self, provider: EngineProvider, model: nn.Module, config_data: Mapping[str, Any]
    ) -> None:
        data = [torch.full((3,), float(index)) for index in range(6)]
        engine = _build(provider, model, config_data, training_data=data)
        batches = list(engine.training_dataloader)
        assert [tuple(batch.shape) for batch in batches] == [(2, 3)] * 3
        assert sorted(float(row[0]) for batch in batches for row in batch) == [float(index) for index in range(6)]
        engine.destroy()

    def test_two_engines_train_apart(
        self, provider: EngineProvider, model: nn.Module, config_data: Mapping[str, Any]
    ) -> None:
        models = [copy.deepcopy(model) for _ in range(3)]
        alone = _build(provider, models[0], config_data)
        expected = [self.train(alone) for _ in range(4)]
        alone.destroy()
        first, second = (_build(provider, one, config_data) for one in models[1:])
        found = []
        for _ in range(4):
            found.append(self.train(first))
            self.train(second)
        assert found == expected
        first.destroy()
        second.destroy()

    def test_destroy_can_be_repeated(self, engine: Any) -> None:
        engine.destroy()
        engine.destroy()


def _build(provider: EngineProvider, model: nn.Module, data: Mapping[str, Any], **arguments: Any) -> Any:
    given = dict.fromkeys(("optimizer", "model_parameters", "training_data", "lr_scheduler", "collate_fn"))
    rest = {"device_index": None, "distributed_port": 29500, "dist_init_required": None}
    return provider.build(model=model, config=load_config(data), **{**given, **rest, **arguments})
