"""``initialize``: where the configuration, the parameters and the parts come from."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ds_core
from ds_core import registry
from ds_core.engine.initialize import add_config_arguments
from ds_core.errors import ConfigError
from ds_core.interfaces.engine import EngineProvider
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "log_level": "error",
    "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
}


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))


def start(**arguments: Any) -> Any:
    return ds_core.initialize(**{"model": model(), "config": CONFIG, **arguments})[0]


def test_the_configuration_may_come_from_four_places(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    places: list[dict[str, Any]] = [
        {"config": CONFIG},
        {"config": str(path)},
        {"config": None, "config_params": CONFIG},
        {"config": None, "args": SimpleNamespace(deepspeed_config=str(path))},
        {"config": None, "args": SimpleNamespace(deepscale_config=str(path), deepspeed_config=None)},
    ]
    for place in places:
        assert start(**place).get_lr() == [0.5]


def test_config_wins_over_config_params():
    assert start(config=CONFIG, config_params={"train_batch_size": "never read"}).get_lr() == [0.5]


def test_the_old_spelling_in_the_arguments(caplog):
    with caplog.at_level("WARNING", logger="ds_core"):
        start(config=None, args=SimpleNamespace(deepscale_config=CONFIG))
    assert "args.deepscale_config is deprecated: write deepspeed_config" in caplog.messages
    with pytest.raises(ConfigError, match="two configurations were given"):
        start(config=None, args=SimpleNamespace(deepscale_config=CONFIG, deepspeed_config=CONFIG))


def test_compatibility_mode_drops_the_keys_of_others(caplog, monkeypatch):
    foreign = {**CONFIG, "msamp": {"enabled": True}}
    with pytest.raises(ConfigError, match="msamp"):
        start(config=foreign)
    with caplog.at_level("WARNING", logger="ds_core"):
        engine = start(config=foreign, compatible=True)
    assert len([message for message in caplog.messages if "msamp" in message]) == 1
    assert "compatibility mode" in engine.report()["msamp"]
    assert engine.config == foreign
    monkeypatch.setenv("DS_CONFIG_COMPATIBLE", "1")
    start(config=foreign)


def test_the_dict_given_is_left_as_it_is():
    given = json.loads(json.dumps(CONFIG))
    start(config=given)
    assert given == CONFIG


def test_four_things_are_returned():
    data = [torch.ones(3)] * 4
    engine, optimizer, loader, schedule = ds_core.initialize(model=model(), config=CONFIG, training_data=data)
    assert optimizer is engine.optimizer
    assert loader is engine.training_dataloader
    assert len(list(loader)) == 2
    assert schedule is None


def test_parameters_may_be_some_of_the_model_or_groups():
    net = model()
    engine = start(model=net, model_parameters=net[0].parameters())
    assert engine.optimizer.param_groups[0]["params"] == list(net[0].parameters())
    net = model()
    groups = [{"params": net[0].weight, "lr": 0.1}, {"params": list(net[1].parameters())}, {"params": []}]
    engine = start(model=net, model_parameters=groups)
    assert engine.get_lr() == [0.1, 0.5], "a group of nothing is left out"
    net = model()
    net[0].requires_grad_(False)
    assert start(model=net).optimizer.param_groups[0]["params"] == list(net[1].parameters())


def test_parameters_and_groups_cannot_be_mixed():
    net = model()
    with pytest.raises(ConfigError, match="mixes parameters and groups"):
        start(model=net, model_parameters=[net[0].weight, {"params": [net[0].bias]}])


def test_an_optimizer_may_be_made_by_a_callable():
    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(groups, lr=0.25)

    engine = start(optimizer=make)
    assert isinstance(engine.optimizer, torch.optim.RMSprop)
    assert engine.get_lr() == [0.25]
    with pytest.raises(ConfigError, match="the optimizer callable returned a list"):
        start(optimizer=lambda groups: groups)
    with pytest.raises(ConfigError, match="LBFGS needs a closure"):
        start(optimizer=lambda groups: torch.optim.LBFGS(groups))


def test_a_schedule_may_be_made_by_a_callable_or_given():
    engine = start(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
    net = model()
    mine = torch.optim.SGD(net.parameters(), lr=0.5)
    given = torch.optim.lr_scheduler.StepLR(mine, 1, gamma=0.5)
    other = start(model=net, optimizer=mine, lr_scheduler=given)
    assert other.lr_scheduler is given
    for one in (engine, other):
        for expected in (0.25, 0.125):
            one.backward(one(torch.ones(2, 3)).sum())
            one.step()
            assert one.get_lr() == [expected]


def test_the_weights_of_the_model_are_the_ones_trained():
    net = model()
    before = net[0].weight.detach().clone()
    engine = start(model=net)
    engine.backward(engine(torch.ones(2, 3)).sum())
    engine.step()
    assert engine.module is net
    assert not torch.equal(net[0].weight, before)


class Claims(EngineProvider):
    def matches(self, model, config) -> bool:
        return isinstance(model, torch.nn.Sequential)

    def build(self, **arguments: Any) -> Any:
        return SimpleNamespace(optimizer="o", training_dataloader="d", lr_scheduler="s", given=arguments)


def test_a_provider_that_claims_the_model_builds_the_engine(monkeypatch):
    plain = registry.load("engine", "plain")
    others = ["claims"]
    monkeypatch.setattr(registry, "names", lambda seam: [*others, "plain"])
    monkeypatch.setattr(registry, "load", lambda seam, name, **_: plain if name == "plain" else Claims)
    engine, optimizer, loader, schedule = ds_core.initialize(model=model(), config=CONFIG, collate_fn=len)
    assert (optimizer, loader, schedule) == ("o", "d", "s")
    assert engine.given["collate_fn"] is len
    assert engine.given["config"].train_batch_size == 2
    others.append("claims_too")
    with pytest.raises(ConfigError, match="several engines claim this model: claims, claims_too"):
        start()


def test_the_arguments_of_deepspeed_are_added():
    parser = add_config_arguments(argparse.ArgumentParser())
    found = parser.parse_args(["--deepspeed", "--deepspeed_config", "ds.json"])
    assert vars(found) == {
        "deepspeed": True,
        "deepspeed_config": "ds.json",
        "deepscale": False,
        "deepscale_config": None,
    }


@pytest.mark.parametrize(("size", "padded"), [(50257, 50264), (7, 8), (50264, None), (8, None), (None, None)])
def test_a_vocabulary_that_is_no_multiple_of_8(size, padded, caplog):
    with caplog.at_level("WARNING", logger="ds_core"):
        start(config={**CONFIG, "log_level": "warning", "vocabulary_size": size})
    said = [message for message in caplog.messages if message.startswith("vocabulary_size")]
    assert len(said) == (padded is not None)
    assert all(message.startswith(f"vocabulary_size: {size} is not") for message in said)
    assert all(message.endswith(f"pad the vocabulary to {padded}") for message in said)


def test_arguments_of_the_engine_are_copies():
    engine = start()
    engine.optimizer_params()["lr"] = 7
    assert engine.optimizer_params() == {"lr": 0.5}
