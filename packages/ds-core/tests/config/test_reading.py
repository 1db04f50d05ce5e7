"""What a configuration may be read from, and what is said when it cannot be."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections import UserDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_core.config import ConfigError, find_problems, load_config
from ds_core.config.reading import read, read_text

GOOD = {"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.95]}}}


def encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


def error_of(source: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(source)
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
    assert (
        read({"train_batch_size": 1, "optimizer": {"params": {"lock": lock}}}).raw["optimizer"]["params"]["lock"]
        is lock
    )


def test_tuples_stay_tuples() -> None:
    assert read({"optimizer": {"params": {"betas": (0.9, [0.95])}}}).raw == {
        "optimizer": {"params": {"betas": (0.9, [0.95])}}
    }


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
    path.write_text('{"train_batch_size": 8, "stage: 1}', encoding="utf-8")
    assert error_of(path).where == str(path)
    assert error_of(encoded(path.read_text(encoding="utf-8"))).where == "base64 text"


def test_duplicate_keys_in_any_object(tmp_path: Path) -> None:
    text = """{"train_batch_size": 8, "fp16": {"enabled": true, "enabled": false},
               "optimizer": {"type": "Adam", "params": {"a": [{"lr": 1, "lr": 2, "lr": 3}]}},
               "train_batch_size": 8}"""
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    for source in (path, encoded(text), encoded("# hjson\n" + text)):
        document = read(source)
        assert document.twice == (
            ("train_batch_size",),
            ("fp16", "enabled"),
            ("optimizer", "params", "a", 0, "lr"),
        )
        assert document.raw["optimizer"]["params"]["a"] == [{"lr": 3}]
        assert [problem.keys for problem in document.duplicates()] == list(document.twice)
        assert {problem.keys for problem in find_problems(source)} >= set(document.twice)
    # The second of three.
    assert read(path).position(("optimizer", "params", "a", 0, "lr")) == (2, text.splitlines()[1].index('"lr": 2') + 1)


def test_duplicates_are_told_with_everything_else() -> None:
    problems = find_problems(encoded('{"train_batch_size": 8, "train_batch_size": 8, "stage": 1}'))
    assert [problem.path for problem in problems] == ["train_batch_size", "stage"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["ds_config.json", "config", "ds-config", "a" * 5000])
@pytest.mark.usefixtures("folder")
def test_missing_file(name: str) -> None:
    error = error_of(name)
    assert error.what.startswith(f"file not found: {name[:200]}")
    assert error.fix == "check the path"
    # Only long text of the right letters may be a spoilt base64.
    assert ("base64" in error.what) == (len(name) > 64)


def test_missing_path(folder: Path) -> None:
    error = error_of(folder / "none.json")
    assert str(error) == (
        f"file not found: {folder / 'none.json'}\n  where: working directory {folder}\n  fix: check the path"
    )


@pytest.mark.parametrize("as_text", [True, False])
def test_missing_file_with_a_near_name(folder: Path, as_text: bool) -> None:
    (folder / "conf").mkdir()
    (folder / "conf" / "ds_config.json").touch()
    given = Path("conf", "ds_confg.json")
    assert error_of(str(given) if as_text else given).fix == 'did you mean "conf/ds_config.json"?'


def test_missing_folder(folder: Path) -> None:
    assert error_of("conf/ds.json").fix == "check the path: there is no folder conf"
    (folder / "ds.json").touch()
    assert error_of("ds.json/x").fix == "check the path: there is no folder ds.json"


@pytest.mark.usefixtures("folder")
def test_no_urls() -> None:
    error = error_of("file:///etc/ds.json")
    assert error.what == "file not found: file:///etc/ds.json"
    assert error.fix == "pass the path alone, without file://"


@pytest.mark.parametrize("text", ["", "  "])
def test_empty_path(text: str) -> None:
    assert error_of(text).what == "the path of the configuration is empty"


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "a\x1b[31m", "~nobody-has-this-name/x.json"])
@pytest.mark.usefixtures("folder")
def test_odd_names(name: str) -> None:
    error = error_of(name)
    assert error.what.startswith("file not found: ")
    assert error.what.isprintable()


@pytest.mark.parametrize("as_text", [True, False])
def test_home_folder(folder: Path, as_text: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    home = folder / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "ds.json").write_text(json.dumps(GOOD), encoding="utf-8")
    document = read("~/ds.json" if as_text else Path("~/ds.json"))
    assert document.raw == GOOD
    assert document.where == str(home / "ds.json")
    error = error_of("~/ds.jsn" if as_text else Path("~/ds.jsn"))
    assert str(error) == (f'file not found: ~/ds.jsn\n  where: {home / "ds.jsn"}\n  fix: did you mean "~/ds.json"?')
    (folder / "~").mkdir()
    (folder / "~" / "ds.json").write_text('{"train_batch_size": 2}', encoding="utf-8")
    assert read("~/ds.json").raw == {"train_batch_size": 2}


def test_bytes_path(folder: Path) -> None:
    (folder / "ds.json").write_text(json.dumps(GOOD), encoding="utf-8")

    class InBytes:
        def __fspath__(self) -> bytes:
            return b"ds.json"

    assert read(InBytes()).raw == GOOD  # type: ignore[arg-type]


def test_deleted_working_directory(folder: Path) -> None:
    (folder / "gone").mkdir()
    os.chdir(folder / "gone")
    (folder / "gone").rmdir()
    assert error_of("ds.json").where == "working directory that was deleted"


def test_file_that_may_not_be_read(folder: Path) -> None:
    path = folder / "ds.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8")
    path.chmod(0)
    script = """
import os, sys
from ds_core.config.reading import read
from ds_core.errors import ConfigError
if os.getuid() == 0:  # who may read everything
    os.setuid(65534)
for source in sys.argv[1:]:
    try:
        read(source)
    except ConfigError as error:
        print(error.what, error.fix, sep="; ")
"""
    closed = folder / "closed"
    closed.mkdir()
    closed.chmod(0)
    folder.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-c", script, "ds.json", "closed/ds.json"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    closed.chmod(0o755)
    expected = "the file cannot be read: Permission denied; give the user who runs this the right to read it\n"
    assert result.stdout == 2 * expected


@pytest.mark.parametrize("as_text", [True, False])
def test_folder(tmp_path: Path, as_text: bool) -> None:
    error = error_of(str(tmp_path) if as_text else tmp_path)
    assert error.what == "the file cannot be read: Is a directory"
    assert error.where == str(tmp_path)


@pytest.mark.parametrize("name", ["UTF-16", "UTF-32"])
@pytest.mark.parametrize("order", ["LE", "BE"])
def test_other_unicode(tmp_path: Path, name: str, order: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(("\ufeff" + json.dumps(GOOD)).encode(f"{name}-{order}"))
    assert error_of(path).what == f"the file is text in {name}, not in UTF-8"
    path.write_bytes(json.dumps(GOOD).encode(f"{name}-{order}"))
    assert error_of(path).what.startswith("this is not text: it has a null byte (line 1, column ")


@pytest.mark.parametrize(
    ("text", "what"), [("", "is empty"), (" \n", "is empty"), ("# nothing\n/* at all */", "holds only comments")]
)
def test_empty_text(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    assert error_of(path).what == f"the text {what}"


def test_numbers_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"steps_per_print": Infinity, "a": -Infinity, "b": NaN}', encoding="utf-8")
    document = read(path)
    assert document.raw["steps_per_print"] == math.inf
    assert document.raw["a"] == -math.inf
    assert math.isnan(document.raw["b"])
    assert document.position(("b",)) == (1, 47)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(b'{"train_batch_size": 8, "x": "\xff"}')
    assert re.fullmatch(r"the file is not text in UTF-8: .* at byte 30", error_of(path).what)


@pytest.mark.parametrize("text", ["[1, 2]", "3", '"text"', "null"])
def test_not_an_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    assert error_of(path).what == f"a configuration must be one object {{ ... }}, got {text}"


def test_json_itself_as_text() -> None:
    assert "got JSON itself" in error_of(json.dumps(GOOD)).what
    assert "got HJSON itself" in error_of("# a comment\ntrain_batch_size: 8").what


@pytest.mark.parametrize("source", [None, 3, ["train_batch_size"]])
def test_not_a_source(source: Any) -> None:
    assert (
        error_of(source).what == f"a configuration must be a dict, a path or base64 text, got {type(source).__name__}"
    )


def test_a_document_is_read_already(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8")
    document = read(path)
    path.write_text("{", encoding="utf-8")
    assert read(document) is document
    assert load_config(document).raw == GOOD
    assert find_problems(document) == []
    assert document.raw == GOOD


def test_text_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 200) / "ds.json"
    path.parent.mkdir()
    path.write_bytes(b"\xef\xbb\xbf{a: 1\r\nb: 2}\r\n")
    document = read(path)
    assert (document.text, document.has_mark, document.file) == ("{a: 1\r\nb: 2}\r\n", True, path)
    assert document.position(("b",)) == (2, 1)
    of_text = read_text(f"\ufeff{document.text}", "here")
    assert of_text == replace(document, where="here", file=None)
    of_base64 = read(base64.urlsafe_b64encode(path.read_bytes()).decode())
    assert of_base64 == replace(of_text, where="base64 text")
    assert not read_text("{a: 1}", "here").has_mark


def test_what_a_document_says(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{\n  "a": {"b": [1, 2]}\n}', encoding="utf-8")
    document = read(path)
    assert (document.where, document.twice, document.is_plain_json) == (str(path), (), True)
    assert document.text == path.read_text(encoding="utf-8")
    assert document.position(("a", "b")) == (2, 9)
    assert document.position(("a", "b", 1)) == (2, 18)
    assert document.position(("a", "c")) is None
    assert document.position(()) is None
    path.write_text("a: 1 # one", encoding="utf-8")
    assert not read(path).is_plain_json
    mapping = read({"a": 1})
    assert (mapping.where, mapping.text, mapping.position(("a",))) == ("config dict", None, None)
