"""Pins what users may rely on: the public names and the entry points."""

from __future__ import annotations

import importlib.metadata as metadata

import ds_zero

PUBLIC: list[str] = []
ENTRY_POINTS: set[tuple[str, str, str]] = set()


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
