"""What the stages refuse: ``ds config check`` says what ``initialize`` does, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from torch import nn

import ds_core
from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "cpu": ({"stage": 1, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer"),
    "nvme": ({"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "there"}}, "offload_optimizer"),
    "both": (
        {"stage": 2, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
        "offload_param",  # a rule of the configuration, so the stage is not asked
    ),
    "zenflow": ({"stage": 1, "zenflow": {}}, "zenflow"),
}
"""File -> its section, and the key that is told."""
ACCEPTED = {"none": {"stage": 2, "offload_optimizer": {"device": "none"}}, "plain": {"stage": 1}}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """File -> what ``ds config check --json`` says of it, where torch cannot be imported."""
    folder = tmp_path_factory.mktemp("configs")
    files = {}
    for name, section in {**{name: section for name, (section, _) in REFUSED.items()}, **ACCEPTED}.items():
        files[name] = _write(folder / f"{name}.json", section)
    code = "import sys; sys.modules['torch'] = None; from ds_core.cli import cli_main; cli_main()"
    command = [sys.executable, "-c", code, "config", "check", "--json", *map(str, files.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    found = zip(files.items(), json.loads(done.stdout), strict=True)
    return {name: {**result, "path": path} for (name, path), result in found}


def _write(path: Path, section: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"train_batch_size": 4, "zero_optimization": section}))
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_check_tells_the_error_of_initialize(told: dict[str, dict[str, Any]], name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ds_core.initialize(model=nn.Linear(2, 1), config=str(told[name]["path"]))
    (problem,) = told[name]["problems"]
    assert f"{problem['path']}: {problem['text']}" == raised.value.what
    assert problem["fix"] == raised.value.fix
    assert problem["path"] == f"zero_optimization.{REFUSED[name][1]}"
    assert problem["line"] == 1


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted_has_neither_problems_nor_notes(told: dict[str, dict[str, Any]], name: str) -> None:
    assert (told[name]["problems"], told[name]["notes"]) == ([], [])
