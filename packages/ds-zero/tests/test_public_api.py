"""Pins what users may rely on: the public names and the entry points."""

from __future__ import annotations

import importlib.metadata as metadata

import ds_zero

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


def test_version_is_that_of_the_distribution() -> None:
    assert ds_zero.__version__ == metadata.version("ds-zero")


def test_entry_points() -> None:
    found = {(entry.group, entry.name, entry.value) for entry in metadata.distribution("ds-zero").entry_points}
    assert found == ENTRY_POINTS


def test_it_is_made_for_the_installed_core() -> None:
    import ds_core

    assert ds_core.__version__.startswith("0.1.")
