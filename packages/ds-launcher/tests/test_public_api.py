"""Pins what users may rely on: the public names and the entry points."""

from __future__ import annotations

import importlib.metadata as metadata

import ds_launcher

ENTRY_POINTS = {
    ("ds_core.runner", "local", "ds_launcher.local:LocalRunner"),
    ("ds_core.cli", "run", "ds_launcher.cli:app"),
}


def test_entry_points() -> None:
    found = {(entry.group, entry.name, entry.value) for entry in metadata.distribution("ds-launcher").entry_points}
    assert found == ENTRY_POINTS


def test_version_is_that_of_the_distribution() -> None:
    assert ds_launcher.__version__ == metadata.version("ds-launcher")


def test_it_is_made_for_the_installed_core() -> None:
    from ds_core.registry import find

    assert find("runner", "local").problem() is None
    assert find("cli", "run").package == "ds-launcher"
