"""What a configuration may be read from, and what is said when it cannot be."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections import UserDict
from typing import TYPE_CHECKING, Any

import pytest

from ds_core.config import ConfigError, find_problems, load_config

if TYPE_CHECKING:
    from pathlib import Path

GOOD = {"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.95]}}}


def encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


def error_of(source: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    return caught.value


def test_dict_is_copied_and_never_changed() -> None:
    given: dict[str, Any] = json.loads(json.dumps(GOOD)) | {"zero_optimization": True, "fp16": {"enabled": "auto"}}
    before = json.dumps(given)
    config = load_config(given)
    assert json.dumps(given) == before == json.dumps(config.raw)
    given["optimizer"]["params"]["betas"][0] = 0.5
    assert config.raw["optimizer"]["params"]["betas"] == [0.9, 0.95]
    assert config.optimizer is not None
    assert config.optimizer.params["betas"] == [0.9, 0.95]


def test_any_mapping() -> None:
    assert load_config(UserDict(GOOD)).train_batch_size == 8


def test_values_that_cannot_be_copied_are_shared() -> None:
    lock = threading.Lock()
    config = load_config({"train_batch_size": 1, "optimizer": {"type": "Adam", "params": {"lock": lock}}})
    assert config.raw["optimizer"]["params"]["lock"] is lock


def test_tuples_stay_tuples() -> None:
    config = load_config({"train_batch_size": 1, "optimizer": {"type": "Adam", "params": {"betas": (0.9, 0.95)}}})
    assert config.optimizer is not None
    assert config.optimizer.params["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("as_text", [True, False])
def test_file(tmp_path: Path, as_text: bool) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8")
    assert load_config(str(path) if as_text else path).raw == GOOD


HJSON = """
{
  // a comment
  train_batch_size: 8   # another
  optimizer: {
    "type": "Adam",
    params: { betas: [0.9, 0.95,], },
  }
}
"""


def test_hjson_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.hjson"
    path.write_text(HJSON, encoding="utf-8")
    assert load_config(path).raw == GOOD


def test_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert load_config(path).raw == GOOD


@pytest.mark.parametrize("text", [json.dumps(GOOD), HJSON, HJSON.strip().removeprefix("{").removesuffix("}")])
@pytest.mark.parametrize("padding", [True, False])
def test_base64(text: str, padding: bool) -> None:
    source = encoded(text)
    assert load_config(source if padding else source.rstrip("=")).raw == GOOD


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 8, "stage": 1}', encoding="utf-8")
    assert error_of(path).where == str(path)
    assert error_of(encoded(path.read_text(encoding="utf-8"))).where == "base64 text"


def test_duplicate_keys_in_any_object(tmp_path: Path) -> None:
    text = """{"train_batch_size": 8, "fp16": {"enabled": true, "enabled": false},
               "optimizer": {"type": "Adam", "params": {"a": [{"lr": 1, "lr": 2, "lr": 3}]}},
               "train_batch_size": 8}"""
    for source in (encoded(text), encoded("# hjson\n" + text)):
        paths = [problem.path for problem in find_problems(source)]
        assert paths == ["train_batch_size", "fp16.enabled", "optimizer.params.a[0].lr"]
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 8, "train_batch_size": 8}', encoding="utf-8")
    assert str(error_of(path)) == (
        f"train_batch_size: is given twice in one object\n  where: {path}\n  fix: keep one of the two"
    )


def test_duplicates_are_told_with_everything_else() -> None:
    error = error_of(encoded('{"train_batch_size": 8, "train_batch_size": 8, "stage": 1}'))
    assert error.what.startswith("2 problems")


@pytest.mark.parametrize("name", ["ds_config.json", "config", "conf/ds.json", "ds-config", "a" * 5000])
def test_missing_file(name: str) -> None:
    error = error_of(name)
    assert error.what.startswith(f"file not found: {name[:200]}")
    assert error.fix == "check the path"
    # Only long text of the right letters may be a spoilt base64.
    assert ("base64" in error.what) == (len(name) > 64)


def test_missing_path(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none.json").what == f"file not found: {tmp_path / 'none.json'}"


@pytest.mark.parametrize("as_text", [True, False])
def test_folder(tmp_path: Path, as_text: bool) -> None:
    error = error_of(str(tmp_path) if as_text else tmp_path)
    assert error.what == "the file cannot be read: Is a directory"
    assert error.where == str(tmp_path)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(b'{"train_batch_size": 8, "x": "\xff"}')
    assert re.fullmatch(r"the file is not text in UTF-8: .* at byte 30", error_of(path).what)


@pytest.mark.parametrize("text", ['{"train_batch_size": 8', '{"a" 1}', "{a: }", "{"])
def test_syntax(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    error = error_of(path)
    assert error.what.startswith("this is neither JSON nor HJSON: ")
    assert "line 1" in error.what
    assert error.where == str(path)


@pytest.mark.parametrize("text", ["[1, 2]", "3", '"text"', "null"])
def test_not_an_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    assert error_of(path).what == f"a configuration must be one object {{ ... }}, got {text}"


def test_json_itself_as_text() -> None:
    assert "got JSON itself" in error_of(json.dumps(GOOD)).what


@pytest.mark.parametrize("source", [None, 3, ["train_batch_size"]])
def test_not_a_source(source: Any) -> None:
    assert (
        error_of(source).what == f"a configuration must be a dict, a path or base64 text, got {type(source).__name__}"
    )


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_files(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"a":' * depth + "1" + "}" * depth, encoding="utf-8")
    assert error_of(path).what == "objects are nested more than 64 deep"


def test_a_dict_that_contains_itself() -> None:
    endless: dict[str, Any] = {"train_batch_size": 1}
    endless["optimizer"] = endless
    assert error_of(endless).what == "objects are nested more than 64 deep"
