from __future__ import annotations

import json

import pytest
import torch

import ds_core
from ds_core import registry
from ds_core._packages import PACKAGE_OF_PLUGIN
from ds_core.cli import facts


@pytest.fixture(scope="module")
def collected():
    return facts.collect()


def test_facts_are_json(collected):
    assert json.loads(json.dumps(collected)) == collected


def test_machine(collected):
    machine = collected["machine"]
    assert 1 <= machine["cpu_cores_usable"] <= machine["cpu_cores"]
    assert machine["memory_bytes"] > 2**28


def test_torch_is_described_through_the_accelerator(collected):
    found = collected["torch"]
    assert (found["version"], found["problem"]) == (torch.__version__, None)
    assert found["backends"]["gloo"] is True
    accelerator = found["accelerator"]
    assert accelerator["problem"] is None
    assert "float32" in accelerator["dtypes"]
    assert accelerator["devices"]
    assert all(device["memory_bytes"] > 0 for device in accelerator["devices"])


def test_packages(collected):
    assert collected["packages"]["ds-core"] == ds_core.__version__


def test_every_plugin_of_every_seam_is_there(collected):
    found = {(plugin["seam"], plugin["name"]) for plugin in collected["plugins"]}
    assert found == {(seam, name) for seam in registry.SEAMS for name in registry.names(seam)}
    own = [plugin for plugin in collected["plugins"] if plugin["package"] == "ds-core"]
    assert own
    assert all(plugin["built_in"] for plugin in own)


def test_missing_packages_say_what_they_bring(collected):
    missing = {entry["package"]: entry for entry in collected["missing"]}
    assert set(missing) == set(PACKAGE_OF_PLUGIN.values()) - set(collected["packages"])
    for package, entry in missing.items():
        assert entry["install"] == f"pip install {package}"
        assert entry["brings"] == [
            f"{seam} {name}" for (seam, name), owner in PACKAGE_OF_PLUGIN.items() if owner == package
        ]


def test_an_accelerator_that_does_not_answer_is_reported(monkeypatch):
    monkeypatch.setattr("ds_core.accelerator.get_accelerator", lambda: 1 / 0)
    assert facts.torch_facts()["accelerator"] == {"problem": "ZeroDivisionError: division by zero"}
