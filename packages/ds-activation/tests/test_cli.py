"""``ds activation profile``: what it prints and draws, and how it ends."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import pytest

from ds_activation import profile as profile_module
from ds_activation.curve import BUDGETS
from ds_core.cli import cli_main
from ds_core.testing.cli import SubcommandContract

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x, scale=1.0):
        return x + self.down(torch.tanh(self.up(x))) * scale

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x, scale=1.0):
        for block in self.blocks:
            x = block(x, scale)
        return x.sum()

def build():
    return Model(), torch.ones(256, 16)

def keywords():
    return Model(), {"x": torch.ones(256, 16), "scale": 2.0}

def wrong():
    return Model()
"""


class TestActivation(SubcommandContract):
    @pytest.fixture
    def name(self):
        return "activation"

    @pytest.fixture
    def entry(self):
        return "ds_activation.cli:app"

    @pytest.fixture
    def failing(self):
        return ["profile", "nowhere.py:build"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # What the command does to the import of modules ends with the test.
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "model", ModuleType("model"))
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def ds_activation(*arguments: object) -> Done:
        with pytest.raises(SystemExit) as ended:
            cli_main(["activation", *map(str, arguments)])
        return Done(ended.value.code, *capsys.readouterr())

    return ds_activation


class Done(NamedTuple):
    returncode: object
    stdout: str
    stderr: str


@pytest.mark.parametrize("function", ["build", "keywords"])
def test_tables(command, model, function):
    done = command("profile", f"{model}:{function}")
    assert done.returncode == 0, done.stderr
    words = [line.split() for line in done.stdout.splitlines() if line.strip()]
    # tanh's result, [256, 64] in fp32; the block's input is that of the linear layer, which counts where it begins.
    saved = [float(row[1]) for row in words if row[0].startswith("blocks.")]
    assert len(saved) == 4
    assert all(0.0625 <= mib <= 0.16 for mib in saved)
    named = {row[0] for row in words}
    assert {"none", "selective", "every_n,", "full", "auto,"} <= named


def test_on_a_device_blocks_may_be_moved_to_the_host(command, model, monkeypatch):
    """What is measured is on the CPU, and counts as on a device with fast copies."""

    class OnDevice(profile_module.Measurement):
        def __init__(self, *arguments):
            super().__init__(*arguments, can_offload=True)

    monkeypatch.setattr(profile_module, "Measurement", OnDevice)
    monkeypatch.setattr(profile_module, "seconds_per_byte", lambda device: (1e-15, 1e-15))
    done = command("profile", f"{model}:build")
    assert done.returncode == 0, done.stderr
    (first, *others) = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("auto,")]
    assert first[-2:] == ["4", "keep"]
    for row in others:
        assert "offload" in row
        assert "recompute" not in row
    assert len(others) == BUDGETS - 1
    full = next(line.split() for line in done.stdout.splitlines() if line.strip().startswith("full"))
    assert full[-2:] == ["4", "recompute"]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_picture(model, tmp_path):
    # As it is installed, in a process of its own; once, because that imports torch.
    code = "import sys; from ds_core.cli import cli_main; cli_main(['activation', *sys.argv[1:]])"
    done = subprocess.run(
        [sys.executable, "-c", code, "profile", f"{model}:build", "--budget", "0.5", "--png", tmp_path / "curve.png"],
        env={**os.environ, "TERM": "dumb", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "auto, 0.50 MiB" in done.stdout


@pytest.mark.parametrize(
    ("target", "options", "told"),
    [
        ("{model}", [], "names no function"),
        ("{model}:biuld", [], "has no function 'biuld'"),
        ("{model}:wrong", [], "it returned a Model"),
        ("a_module_that_is_not_there:build", [], "there is no module 'a_module_that_is_not_there'"),
        ("{model}:build", ["--modules", "Blck"], "Blck"),
        ("{model}:build", ["--budget", "0.001"], "memory_budget"),
    ],
)
def test_mistakes(command, model, target, options, told):
    done = command("profile", target.format(model=model), *options)
    assert done.returncode == 1
    assert told in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr
