"""The demo's ``--precision``: what it changes, and that a low precision learns as well as fp32 does."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ds_core.config import load_config

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

GPT_FOLDER = Path(__file__).parents[1] / "examples" / "gpt"
BIN = Path(sys.executable).parent
NATS = 0.02
STEPS = 120
NAMES = ("data", "model", "plot", "precisions", "progress", "train")


def run(*words: object, cwd: Path) -> str:
    """Run a command as a user would, outside any job, and return what it printed."""
    job = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in job}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The demo's files as modules, by the names they know each other by; forgotten afterwards."""
    monkeypatch.syspath_prepend(GPT_FOLDER)
    assert not set(NAMES) & set(sys.modules)
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of a comparison of all precisions on the tiny GPT, and what it printed."""
    out = tmp_path_factory.mktemp("precisions")
    words = [sys.executable, GPT_FOLDER / "precisions.py", "--steps", STEPS, "--seeds", 1, "--no-yardstick"]
    return out, run(*words, "--out", out, cwd=out)


def test_every_precision_learns_as_well_as_fp32(compared: tuple[Path, str]) -> None:
    runs = {run["precision"]: run for run in json.loads((compared[0] / "tiny.json").read_text())["runs"]}
    assert list(runs) == ["fp32", "bf16", "autocast", "fp16"]
    final = {name: run["validation"][-1] for name, run in runs.items()}
    assert {step for step, _ in final.values()} == {STEPS}
    away = {name: abs(loss - final["fp32"][1]) for name, (_, loss) in final.items() if name != "fp32"}
    assert max(away.values()) <= NATS, away
    # Near to each other because all have learned, not because none has.
    assert final["fp32"][1] < runs["fp32"]["validation"][0][1] - 2
    # And it was not the same computation four times.
    assert len({json.dumps(run["loss"]) for run in runs.values()}) == 4


def test_every_run_says_its_precision_and_the_table_compares_them(compared: tuple[Path, str]) -> None:
    out, printed = compared
    said = [line.split()[1] for line in printed.splitlines() if line.startswith("precision  ") and "loss" not in line]
    assert said == ["Fp32", "Bf16", "TorchAutocast", "Fp16"]
    assert "loss scale      65536, moves" in printed
    table = (out / "tiny.txt").read_text()
    assert table in printed
    assert table.count("yes") == 3
    assert (out / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_a_precision_that_ends_elsewhere_is_told(scripts: dict[str, ModuleType]) -> None:
    precisions = scripts["precisions"]

    def runs(*differences: float) -> list[object]:
        return [precisions.Run("bf16", seed, 2.5, difference, 0, [], []) for seed, difference in enumerate(differences)]

    assert precisions.PROMISED == NATS
    assert not precisions.is_kept("bf16", runs(0.021))
    assert not precisions.is_kept("bf16", runs(-0.021))
    assert precisions.is_kept("bf16", runs(-0.019))
    # No seed makes up for another.
    assert not precisions.is_kept("bf16", runs(0.021, -0.021))
    assert precisions.is_kept("bf16", runs(0.019, -0.019))


def test_only_a_run_that_has_come_to_its_end_is_kept(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    is_complete, history = scripts["precisions"].is_complete, scripts["progress"].History(tmp_path, resumed_at=None)
    history.add(3, validation_loss=2.0)
    history.add(4, loss=2.0)
    history.close()
    assert is_complete(tmp_path, 3)
    assert not is_complete(tmp_path, 4)
    assert not is_complete(tmp_path / "none", 3)


@pytest.mark.parametrize(
    ("word", "enabled"), [("fp32", []), ("fp16", ["fp16"]), ("bf16", ["bf16"]), ("autocast", ["torch_autocast"])]
)
def test_a_word_enables_one_section_and_keeps_the_rest(
    scripts: dict[str, ModuleType], word: str, enabled: list[str]
) -> None:
    given = json.loads((GPT_FOLDER / "ds_config.json").read_text()) | {"fp16": {"initial_scale_power": 12}}
    assert given["bf16"] == {"enabled": True}
    config = load_config(scripts["train"].with_precision(given, word), dp_world_size=2)
    assert [name for name in ("fp16", "bf16", "torch_autocast") if getattr(config, name).enabled] == enabled
    assert config.fp16.initial_scale_power == 12
    assert config.gradient_clipping == given["gradient_clipping"]
    # What was given is not changed: a caller may go on with it.
    assert given["bf16"] == {"enabled": True}


def test_the_line_of_the_readme_runs(tmp_path: Path) -> None:
    lines = [line for line in (GPT_FOLDER / "README.md").read_text().splitlines() if "train.py" in line]
    (line,) = [line for line in lines if "--precision" in line and line.startswith("ds run")]
    words = [str(GPT_FOLDER / word) if word == "train.py" else word for word in shlex.split(line)]
    tiny = ["--context=32", "--layers=1", "--heads=2", "--channels=32", "--steps=2"]
    printed = run(BIN / words[0], *words[1:], *tiny, cwd=tmp_path)
    assert "precision       Fp32" in printed
    assert "stopped at step 2 of 2" in printed
