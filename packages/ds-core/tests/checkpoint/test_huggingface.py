"""Hugging Face's layout: sizes, order, shards, index, aliases, and what is in the folder before."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from ds_core.checkpoint.huggingface import STAGING, Layout, natural, parse_dtype, parse_size, plan_layout, write_layout
from ds_core.checkpoint.safetensors_format import Entry, write_stream
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


def plan(sizes: dict[str, int], limit=None, shared=None, safe=True) -> Layout:
    entries = [Entry(name, "uint8", (size,)) for name, size in sizes.items()]
    return plan_layout(entries, shared or {}, max_shard_size=limit, safe_serialization=safe)


def write(folder: Path, layout: Layout, value: int = 1) -> None:
    def write_file(path: Path, name: str) -> None:
        write_stream(
            path,
            layout.files[name],
            layout.metadata(name),
            lambda entry: [np.full(entry.nbytes, value, "u1").data],
        )

    write_layout(folder, layout, write_file)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [("5GB", 5 * 10**9), ("1.5 mb", 1500000), ("10KB", 10**4), (" 2TB ", 2 * 10**12), ("7", 7), ("7b", 7), (9, 9)],
)
def test_sizes_are_decimal(size, nbytes):
    assert parse_size(size) == nbytes


@pytest.mark.parametrize("size", [None, "none", "None", "NONE"])
def test_no_limit(size):
    assert parse_size(size) is None


@pytest.mark.parametrize(
    ("given_dtype", "word"),
    [
        *((each, each) for each in ("float32", "bfloat16", "float16")),
        *(("fp32", "float32"), ("BF16", "bfloat16"), ("fp16", "float16"), ("half", "float16")),
        *((torch.bfloat16, "bfloat16"), (torch.float32, "float32"), ("torch.float16", "float16")),
        *((None, None), ("none", None), ("None", None), ("Stored", None)),
    ],
)
def test_words_of_dtypes(given_dtype, word):
    assert parse_dtype(given_dtype) == word


@pytest.mark.parametrize("given_dtype", ["", "int8", "float8", 5, torch.int32, "float64"])
def test_dtypes_that_are_none(given_dtype):
    with pytest.raises(CheckpointError, match="weights cannot be exported as") as caught:
        parse_dtype(given_dtype)
    assert caught.value.fix == "one of float32, bfloat16, float16, or None for what the model has"


@pytest.mark.parametrize("size", ["", "GB", "5 XB", "-5GB", "0", 0, -1, "5GiB", True, 1.5j])
def test_sizes_that_are_none(size):
    with pytest.raises(CheckpointError, match="the size of a shard is") as caught:
        parse_size(size)
    assert "'5GB'" in caught.value.fix


@given(st.lists(st.text(), max_size=8))
def test_names_of_any_kind_have_an_order(given_names):
    ordered = sorted(given_names, key=lambda name: (natural(name), name))
    backwards = given_names[::-1]
    assert sorted(backwards, key=lambda name: (natural(name), name)) == ordered


def test_shards_are_full_and_in_order():
    layout = plan({"h.10.w": 4, "h.9.w": 4, "h.1.w": 4, "big": 50, "a": 1}, 10)
    assert {name: [entry.name for entry in entries] for name, entries in layout.files.items()} == {
        "model-00001-of-00004.safetensors": ["a"],
        "model-00002-of-00004.safetensors": ["big"],
        "model-00003-of-00004.safetensors": ["h.1.w", "h.9.w"],
        "model-00004-of-00004.safetensors": ["h.10.w"],
    }


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 40))
def test_no_shard_is_larger_than_asked_unless_a_tensor_is(sizes, limit):
    layout = plan({str(number): size for number, size in enumerate(sizes)}, limit)
    assert [entry.nbytes for entry in layout.entries] == sizes
    for entries in layout.files.values():
        assert len(entries) == 1 or sum(entry.nbytes for entry in entries) <= limit


def test_one_file_has_no_index(tmp_path):
    layout = plan({"b": 2, "a": 3}, "5GB", {"z": "a", "y": "gone"})
    write(tmp_path / "new" / "folder", layout)
    assert names(tmp_path / "new" / "folder") == ["model.safetensors"]
    with safe_open(tmp_path / "new" / "folder" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt", "z": "a"}
        assert list(file.keys()) == ["a", "b"]
    done = layout.exported(tmp_path)
    assert (done.files, done.index, done.tensors, done.nbytes) == (("model.safetensors",), None, 2, 5)
    assert done.shared == {"z": "a"}


def test_the_index_says_where_everything_is(tmp_path):
    layout = plan({"b": 2, "a": 3, "c": 4}, 6, {"z": "c"})
    write(tmp_path, layout, 7)
    text = (tmp_path / "model.safetensors.index.json").read_text()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    places = {"a": first, "b": first, "c": second}
    expected = {"metadata": {"total_size": 9}, "weight_map": places}
    assert text == json.dumps(expected, indent=2, sort_keys=True) + "\n"
    assert {name: load_file(tmp_path / place)[name].tolist() for name, place in places.items()} == {
        "a": [7] * 3,
        "b": [7] * 2,
        "c": [7] * 4,
    }
    with safe_open(tmp_path / second, framework="np") as file:
        assert file.metadata() == {"format": "pt", "z": "c"}


def test_aliases_are_in_the_index_of_bin_files():
    index = json.loads(plan({"a": 3, "c": 4}, 3, {"z": "c"}, safe=False).index_text())
    assert index["weight_map"] == {
        "a": "pytorch_model-00001-of-00002.bin",
        "c": "pytorch_model-00002-of-00002.bin",
        "z": "pytorch_model-00002-of-00002.bin",
    }


def test_wide_dtypes_come_first_so_that_all_are_aligned():
    entries = [Entry("a", "uint8", (3,)), Entry("b", "float32", ()), Entry("c", "bfloat16", (1,))]
    layout = plan_layout(entries, {}, max_shard_size=None, safe_serialization=True)
    assert [entry.name for entry in layout.entries] == ["b", "c", "a"]


def test_a_model_without_weights_is_a_file_too(tmp_path):
    write(tmp_path, plan({}))
    assert load_file(tmp_path / "model.safetensors") == {}


def test_an_alias_never_takes_the_name_of_a_weight():
    assert plan({"a": 1, "b": 1}, shared={"b": "a"}).shared == {}


@pytest.mark.parametrize("before", [None, 2, 3])
@pytest.mark.parametrize("after", [None, 2, 3])
def test_what_an_earlier_export_left_is_replaced(before, after, tmp_path):
    others = ["config.json", "model.py", "pytorch_model.bin", "my-00001-of-00002.safetensors"]
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / STAGING).mkdir()
    (tmp_path / STAGING / "model.safetensors").write_text("of a killed export")
    write(tmp_path, plan({"a": 2, "b": 2, "c": 2}, before), 1)
    layout = plan({"a": 2, "b": 2, "c": 2}, after)
    write(tmp_path, layout, 2)
    index = [] if layout.index is None else [layout.index]
    assert names(tmp_path) == sorted([*others, *layout.files, *index])
    assert all((tmp_path / name).read_text() == "mine" for name in others)
    for name in layout.files:
        assert all(set(value.tolist()) == {2} for value in load_file(tmp_path / name).values())


def test_a_bin_file_beside_safetensors_would_never_be_loaded(tmp_path):
    write(tmp_path, plan({"a": 2}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is in the folder") as caught:
        write(tmp_path, plan({"a": 2}, safe=False))
    assert caught.value.where == str(tmp_path)
    assert names(tmp_path) == ["model.safetensors"]


def test_a_failure_leaves_what_was_there(tmp_path):
    old = plan({"a": 2, "b": 2}, 2)
    write(tmp_path, old, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(path: Path, name: str) -> None:
        path.write_text("x")
        raise OSError(28, "No space left on device", str(path))

    with pytest.raises(CheckpointError, match="cannot be written: No space left on device") as caught:
        write_layout(tmp_path, plan({"a": 2, "b": 2}, 2), fail)
    assert "model-00001-of-00002" in caught.value.where
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="File exists") as caught:
        write(tmp_path / "out", plan({"a": 2}))
    assert caught.value.where == str(tmp_path / "out")


def test_it_loads_no_torch():
    script = (
        "import sys; sys.modules['torch'] = None; import ds_core.checkpoint.huggingface, "
        "ds_core.checkpoint.safetensors_format"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_what_cannot_be_cleared_away_does_not_hide_what_went_wrong(tmp_path, monkeypatch):
    def cannot(*_: object, **options: object) -> None:
        if not options.get("ignore_errors"):
            raise PermissionError(13, "Permission denied")

    def write_file(path: Path, name: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "rmtree", cannot)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_layout(tmp_path / "out", plan({"a": 4}), write_file)
    shown = tmp_path / "shown"
    write(shown, plan({"a": 4}))
    assert names(shown) == [STAGING, "model.safetensors"], "all is in place; the next export clears it away"
