"""``ds ckpt export``: what it writes and prints, without torch, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent / "deepspeed-0.19.6"
CASE = FIXTURES / "plain-stage3-world2-bf16"
TAG = ("--tag", "global_step4")
CODE = "import sys; sys.modules['torch'] = None; from ds_core.cli import cli_main; cli_main(['ckpt', *sys.argv[1:]])"


def export(*arguments: object, code: str = CODE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, "export", *map(str, arguments)],
        env={**os.environ, "COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_one_file(tmp_path):
    done = export(CASE, tmp_path / "out", *TAG)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"8 tensors, 1.1 KiB: {tmp_path / 'out'}/model.safetensors\n"
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def test_shards_of_another_dtype(tmp_path):
    done = export(CASE, tmp_path, *TAG, "--dtype", "bfloat16", "--max-shard-size", "300B")
    assert done.stdout == f"8 tensors, 564 B: {tmp_path}/3 files and model.safetensors.index.json\n"
    assert {v.dtype for path in tmp_path.glob("*.safetensors") for v in load_file(path).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("stored", torch.bfloat16), ("None", torch.bfloat16), ("FP16", torch.float16), ("half", torch.float16)],
)
def test_words_of_dtypes_and_of_no_limit(word, dtype, tmp_path):
    assert export(CASE, tmp_path, *TAG, "--dtype", word, "--max-shard-size", "None").returncode == 0
    assert load_file(tmp_path / "model.safetensors")["emb.weight"].dtype == dtype


def test_a_bin_file_needs_torch(tmp_path):
    done = export(CASE, tmp_path / "out", *TAG, "--bin")
    assert done.returncode == 1
    assert "a .bin file is written with torch, which is not installed" in done.stderr
    assert "pip install torch" in done.stderr
    assert "Traceback" not in done.stderr
    done = export(CASE, tmp_path / "out", *TAG, "--bin", code=CODE.replace("sys.modules['torch'] = None; ", ""))
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True).keys()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--dtype", "int8"), "one of float32, bfloat16, float16"),
        (("--max-shard-size", "big"), "the size of a shard is 'big'"),
        (("--tag", "nowhere"), "there is no checkpoint 'nowhere'"),
    ],
)
def test_what_cannot_be_is_told(options, named, tmp_path):
    done = export(CASE, tmp_path / "out", *TAG, *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert named in done.stderr
    assert not (tmp_path / "out").exists()
