"""``ds config migrate``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner, Result

from ds_core.cli.config import app
from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

OLD = """{
  "bfloat16": {
    "enabled": true
  },
  "zero_optimization": {
    "stage": 2,
    "reduce_bucket_size": 5e8,
    "cpu_offload": true,
    "cpu_offload_use_pin_memory": true
  }
}
"""
NEW = """{
  "bf16": {
    "enabled": true
  },
  "zero_optimization": {
    "stage": 2,
    "reduce_bucket_size": 5e8,
    "offload_optimizer": {"device": "cpu"}
  }
}
"""
DONE = """\
ds.json: 3 deprecated keys rewritten
  bfloat16 -> bf16
  zero_optimization.cpu_offload -> zero_optimization.offload_optimizer
  zero_optimization.cpu_offload_use_pin_memory -> removed: write "pin_memory" in an offload section
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ds.json"
    path.write_text(OLD, encoding="utf-8")
    return path


def migrate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["migrate", *arguments])


def test_prints_the_result_and_says_what_it_did(file: Path) -> None:
    result = migrate("ds.json")
    assert result.exit_code == 0
    assert result.stdout == NEW
    assert result.stderr == DONE
    assert file.read_text(encoding="utf-8") == OLD


def test_in_place(file: Path) -> None:
    result = migrate("ds.json", "--in-place")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", DONE)
    assert file.read_text(encoding="utf-8") == NEW
    assert list(file.parent.iterdir()) == [file]


def test_backup(file: Path) -> None:
    result = migrate("ds.json", "--in-place", "--backup")
    assert result.stderr.startswith("ds.json: the old file is ")
    assert (file.parent / "ds.json.bak").read_text(encoding="utf-8") == OLD
    assert file.read_text(encoding="utf-8") == NEW


def test_output(file: Path) -> None:
    result = migrate("ds.json", "--output", "new.json")
    assert (result.stdout, result.stderr) == ("", DONE)
    assert (file.parent / "new.json").read_text(encoding="utf-8") == NEW
    assert file.read_text(encoding="utf-8") == OLD


def test_nothing_to_do(file: Path) -> None:
    file.write_text(NEW, encoding="utf-8")
    before = file.stat()
    result = migrate("ds.json", "--in-place", "--backup")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "ds.json: no deprecated keys\n")
    after = file.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert list(file.parent.iterdir()) == [file]
    assert migrate("ds.json").stdout == NEW


def test_legacy_zero(file: Path) -> None:
    file.write_text('{"zero_optimization": true}', encoding="utf-8")
    assert migrate("ds.json").stderr == (
        "ds.json: 1 deprecated key rewritten\n"
        '  zero_optimization -> "zero_optimization": {"stage": 1, "allgather_bucket_size": 500000000}\n'
    )


def test_other_problems_are_left_and_counted(file: Path) -> None:
    file.write_text('{"bfloat16": {"enabld": true}, "gradient_cliping": 1}', encoding="utf-8")
    result = migrate("ds.json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"bf16": {"enabld": True}, "gradient_cliping": 1}
    assert result.stderr.endswith("ds.json: 2 problems left: `ds config check` tells them\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"bfloat16": {}, "bf16": {"enabled": true}}', "its replacement"),
        ('{"bf16": {}, "bf16": {}}', "is given twice"),
        ("{zero_optimization: {cpu_offload: false # slow\n stage: 2}}", "cannot be kept"),
    ],
)
def test_refused_files_are_left_alone(file: Path, text: str, words: str) -> None:
    file.write_text(text, encoding="utf-8")
    result = migrate("ds.json", "--in-place")
    assert isinstance(result.exception, ConfigError)
    assert words in str(result.exception)
    assert file.read_text(encoding="utf-8") == text


def test_drop_comments(file: Path) -> None:
    file.write_text("{zero_optimization: {cpu_offload: false # slow\n stage: 2}}", encoding="utf-8")
    assert migrate("ds.json", "--in-place", "--drop-comments").exit_code == 0
    assert json.loads(file.read_text(encoding="utf-8")) == {"zero_optimization": {"stage": 2}}


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("options", [["--in-place", "--output", "x.json"], ["--backup"]])
def test_options_that_exclude_each_other(options: list[str]) -> None:
    assert migrate("ds.json", *options).exit_code == 2


def test_no_such_file(tmp_path: Path) -> None:
    result = migrate(str(tmp_path / "missing.json"))
    assert isinstance(result.exception, ConfigError)
    assert "file not found" in str(result.exception)
