"""Pins what users may rely on: the public names and the entry points."""

from __future__ import annotations

import importlib.metadata as metadata

import pytest

import ds_core
import ds_zero
from ds_core.errors import NotBuiltError

PUBLIC = [
    "DeepSpeedZeroOptimizer",
    "ZeroStage1",
    "ZeroStage2",
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
]
ENTRY_POINTS = {
    ("ds_core.partition", "1", "ds_zero.partition:ZeroStage1"),
    ("ds_core.partition", "2", "ds_zero.partition:ZeroStage2"),
}


def test_public_names() -> None:
    assert ds_zero.__all__ == PUBLIC
    assert all(hasattr(ds_zero, name) for name in PUBLIC)


@pytest.mark.parametrize("name", ["Init", "GatheredParameters", "TiledLinear"])
def test_names_of_stage_3_say_that_they_are_not_built(name: str) -> None:
    for module in (ds_zero, ds_core.zero):
        with pytest.raises(NotBuiltError, match=f"ds_zero.{name} is not built yet") as caught:
            getattr(module, name)
        assert "parameters are whole on every rank" in str(caught.value)
    assert not hasattr(ds_zero, name)
    with pytest.raises(AttributeError, match="no attribute 'Initt'"):
        _ = ds_zero.Initt


def test_version_is_that_of_the_distribution() -> None:
    assert ds_zero.__version__ == metadata.version("ds-zero")


def test_entry_points() -> None:
    found = {(entry.group, entry.name, entry.value) for entry in metadata.distribution("ds-zero").entry_points}
    assert found == ENTRY_POINTS


def test_it_is_made_for_the_installed_core() -> None:
    assert ds_core.__version__.startswith("0.1.")
