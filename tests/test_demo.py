"""The demo with a tiny model: two ranks, stopped and resumed, against the same run without a stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TINY = ["--context=32", "--layers=1", "--heads=2", "--channels=32", "--log-every=1", "--validate-every=2"]
STEPS = 4


def run(*words: object) -> str:
    """Run a command as a user would, outside any job, and return what it printed; it warns of nothing."""
    job = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in job}
    done = subprocess.run(
        [str(word) for word in words],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "[WARNING]" not in done.stdout + done.stderr
    return done.stdout


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def values(lines: list[dict[str, float]], key: str) -> dict[float, float]:
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of a demo of four steps, stopped after two, and what the demo printed."""
    out = tmp_path_factory.mktemp("demo")
    return out, run(sys.executable, EXAMPLES / "demo.py", "--steps", STEPS, "--out", out, "--", *TINY)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    ds = Path(sys.executable).with_name("ds")
    run(ds, "run", "--nproc", 2, EXAMPLES / "gpt" / "train.py", "--out", out, "--steps", STEPS, *TINY)
    return out


def test_the_resumed_run_equals_the_uninterrupted_one_bit_for_bit(demo: tuple[Path, str], uninterrupted: Path) -> None:
    resumed, whole = history(demo[0]), history(uninterrupted)
    assert values(resumed, "resumed") == {2: True}
    for key in ("loss", "validation_loss", "lr"):
        assert values(resumed, key) == values(whole, key)
    assert list(values(whole, "loss")) == [1, 2, 3, 4]
    assert list(values(whole, "validation_loss")) == [0, 2, 4]
    # The losses differ from step to step, so equal ones do not come from data or weights that stand still.
    assert len(set(values(whole, "loss").values())) == STEPS


def test_the_demo_leaves_a_plot_a_checkpoint_and_a_sample(demo: tuple[Path, str]) -> None:
    out, printed = demo
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / (out / "latest").read_text().strip()).is_dir()
    assert str(out / "loss.png") in printed
    sample = printed.split("sample.py")[1]
    assert "def " in sample
    # 600 bytes were asked for; an untrained model writes bytes that are no text, so characters are fewer.
    assert len(sample) > 200


def test_the_demo_trains_in_bf16_and_says_so_once(demo: tuple[Path, str]) -> None:
    _, printed = demo
    assert printed.count("--precision bf16") == 2
    assert printed.count("precision       Bf16") == 1
    (row,) = [line for line in printed.splitlines() if line.startswith("0 ")]
    assert row.split()[3:8] == ["bfloat16", "bfloat16", "bfloat16", "bfloat16", "float32"]
    assert f"after {STEPS} steps in bf16." in printed


def test_a_sample_is_written_by_the_fp32_masters(demo: tuple[Path, str]) -> None:
    code = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from sample import load_model
weight = load_model(Path(sys.argv[2])).embedding.weight
print(weight.dtype, bool((weight == weight.bfloat16()).all()))
"""
    # What training stored in bf16 has come back with digits that bf16 does not have.
    assert run(sys.executable, "-c", code, EXAMPLES / "gpt", demo[0]).split() == ["torch.float32", "False"]


def test_an_untrained_model_is_about_as_good_as_guessing(uninterrupted: Path) -> None:
    # ln 256 = 5.545. A little less: tied weights make a repeated byte likely from the start, and blanks do repeat.
    first = values(history(uninterrupted), "validation_loss")[0]
    assert first == pytest.approx(5.545, abs=0.25)


def test_stage_2_trains_alike_and_stage_0_goes_on_from_it(uninterrupted: Path, tmp_path: Path) -> None:
    ds = Path(sys.executable).with_name("ds")
    train = [ds, "run", "--nproc", 2, EXAMPLES / "gpt" / "train.py", "--out", tmp_path, "--steps", STEPS, *TINY]
    first = run(*train, "--zero", 2, "--stop-after", 2)
    (row,) = [line for line in first.splitlines() if line.startswith("0 ")]
    assert row.split()[3:8] == ["bfloat16", "bfloat16", "bfloat16", "bfloat16", "float32"]
    run(*train, "--zero", 0, "--resume")
    for key in ("loss", "validation_loss"):
        # Another order of the same additions, in bf16: 8 bits. The rate is still warming up, so little comes of it.
        assert values(history(tmp_path), key) == pytest.approx(values(history(uninterrupted), key), rel=2**-8)
    assert values(history(tmp_path), "lr") == values(history(uninterrupted), "lr")


def test_a_resume_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    words = [sys.executable, EXAMPLES / "gpt" / "train.py", "--out", tmp_path / "none", "--resume", *TINY]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert f"there is no checkpoint in {tmp_path / 'none'} to go on from" in done.stderr
