"""``ds config schema``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from typer.testing import CliRunner, Result

from ds_core.cli.config import app
from ds_core.config.schema import json_schema

if TYPE_CHECKING:
    from pathlib import Path


def schema(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["schema", *arguments])


def test_prints_the_whole_schema() -> None:
    result = schema()
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json_schema()


def test_prints_that_of_one_key() -> None:
    assert json.loads(schema("fp16").stdout) == json_schema("fp16")


def test_writes_a_file(tmp_path: Path) -> None:
    result = schema("fp16", "--output", str(tmp_path / "fp16.json"))
    assert (result.exit_code, result.stdout) == (0, "")
    assert json.loads((tmp_path / "fp16.json").read_text(encoding="utf-8")) == json_schema("fp16")


def test_unknown_key(site: Any) -> None:
    done = site.ds("config", "schema", "fp61")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "no top-level key is called 'fp61'\n  fix: did you mean 'fp16'?\n"


def test_knows_the_sections_of_plugins(site: Any) -> None:
    site.module(
        "mine",
        '"""A section."""\n'
        "from ds_core.config import Section\n"
        'class Mine(Section):\n    """Mine."""\n    depth: int = 1\n    """How deep."""\n',
    )
    site.distribution("mine", {"mine": "mine:Mine"}, seam="config")
    done = site.ds("config", "schema", "mine")
    found = json.loads(done.stdout)["$defs"]["Mine"]["properties"]["depth"]
    assert found["description"] == "How deep. Default: `1`."


def test_loads_no_torch(site: Any) -> None:
    done = site.ds("config", "schema", before="import sys; sys.modules['torch'] = None")
    assert done.returncode == 0, done.stderr
