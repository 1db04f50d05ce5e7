"""Pins what users may rely on: the public names and the entry points."""

from __future__ import annotations

import importlib.metadata as metadata

import ds_ckpt

PUBLIC = [
    "Checkpoint",
    "CheckpointError",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "export",
    "get_fp32_state_dict_from_zero_checkpoint",
    "load_state_dict_from_zero_checkpoint",
    "open",
]
ENTRY_POINTS = {
    ("ds_core.checkpoint", "async", "ds_ckpt.background:AsyncCheckpoint"),
    ("ds_core.checkpoint", "sharded", "ds_ckpt.sharded:ShardedCheckpoint"),
    ("ds_core.cli", "ckpt", "ds_ckpt.cli:app"),
}


def test_public_names() -> None:
    assert ds_ckpt.__all__ == PUBLIC
    assert all(hasattr(ds_ckpt, name) for name in PUBLIC)


def test_version_is_that_of_the_distribution() -> None:
    assert ds_ckpt.__version__ == metadata.version("ds-ckpt")


def test_entry_points() -> None:
    found = {(entry.group, entry.name, entry.value) for entry in metadata.distribution("ds-ckpt").entry_points}
    assert found == ENTRY_POINTS


def test_it_is_made_for_the_installed_core() -> None:
    import ds_core

    assert ds_core.__version__.startswith("0.1.")
