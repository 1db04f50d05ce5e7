"""Values that could not be taken over are missed when they are asked for, and not before."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import ds_core
from ds_core.checkpoint.partly import Partly, values_of
from ds_core.errors import CheckpointError
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here


@pytest.fixture
def state() -> Partly:
    return Partly({"epoch": 3}, {"mask": "a tensor of 4 GB"}, "client_state")


@pytest.mark.parametrize(
    "ask",
    [
        lambda state: state["mask"],
        lambda state: state.get("mask"),
        lambda state: state.get("mask", 1),
        lambda state: state.pop("mask"),
        lambda state: state.pop("mask", 1),
    ],
)
def test_what_is_not_there_says_why(ask, state):
    assert "mask" in state
    for each in (state, copy.deepcopy(state)):
        with pytest.raises(CheckpointError, match="'mask', and it cannot be read: a tensor of 4 GB") as caught:
            ask(each)
        assert caught.value.where == "client_state['mask']"
    assert state.told() == "client_state has no 'mask': a tensor of 4 GB"


def test_all_else_is_a_dictionary_s(state):
    assert state == {"epoch": 3}
    assert (state["epoch"], state.get("epoch"), state.get("other"), state.get("other", 5)) == (3, 3, None, 5)
    assert "other" not in state
    with pytest.raises(KeyError, match="other"):
        state["other"]
    with pytest.raises(KeyError, match="other"):
        state.pop("other")
    assert (state.pop("other", 7), state.pop("epoch"), list(state)) == (7, 3, [])
    state["mask"] = "mine"
    assert (state["mask"], state.pop("mask")) == ("mine", "mine")


def test_without_reasons_values_are_what_they_are():
    values = {"a": 1}
    assert values_of({"client_state": values}, "client_state") is values
    assert values_of({"client_state": values, "client_state_missing": 5}, "client_state") is values
    assert values_of({"client_state": [1], "client_state_missing": {"a": "b"}}, "client_state") == [1]
    assert values_of({}, "client_state") == {}


class Counting(torch.nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None: ...


@pytest.mark.parametrize("module", [torch.nn.Linear, Counting])
def test_an_engine_loads_what_there_is(module, tmp_path, caplog):
    config = {"train_batch_size": 1, "checkpoint": {"engine": "plain"}}
    engine, *_ = ds_core.initialize(model=module(2, 1), config=config)
    engine.save_checkpoint(tmp_path, "tag", client_state={"epoch": 3})
    manifest = tmp_path / "tag" / "checkpoint.json"
    content = json.loads(manifest.read_text())
    content["state"]["client_state_missing"] = {"mask": "a tensor of 4 GB"}
    content["state"] |= {"extra_state": {}, "extra_state_missing": {"": "a tensor of 5 GB"}}
    manifest.write_text(json.dumps(content))
    torch.nn.init.zeros_(engine.module.weight)
    if module is Counting:
        with pytest.raises(CheckpointError, match="it cannot be read: a tensor of 5 GB"):
            engine.load_checkpoint(tmp_path)
        return
    _, found = engine.load_checkpoint(tmp_path)
    assert engine.module.weight.any()
    assert found == {"epoch": 3}
    with pytest.raises(CheckpointError, match="a tensor of 4 GB"):
        found["mask"]
    assert "client_state has no 'mask': a tensor of 4 GB" in caplog.text
