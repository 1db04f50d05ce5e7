"""Options of the engines: `ds config check` finds what is wrong with them, without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize("engine", ["sharded", "async"])
def test_check_knows_the_options_without_torch(engine, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"checkpoint": {"engine": engine, engine: {"keeplast": 1}}}))
    code = "import sys; sys.modules['torch'] = None; from ds_core.cli import cli_main; cli_main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "config", "check", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert f"checkpoint.{engine}.keeplast: unknown key (its value is 1)" in done.stdout
    assert 'fix: did you mean "keep_last"?' in done.stdout
