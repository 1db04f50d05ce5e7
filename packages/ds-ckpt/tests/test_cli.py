"""``ds ckpt``: what it prints, that it needs no torch, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from ds_ckpt.config import ShardedConfig
from ds_ckpt.formats import read
from ds_ckpt.sharded import ShardedCheckpoint
from ds_ckpt.tables import size_in_words
from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.interfaces.logical import Chunk, LogicalTensor, Piece, Snapshot
from ds_core.testing.cli import SubcommandContract

if TYPE_CHECKING:
    from pathlib import Path

# A package that cannot be imported stands for torch.
CODE = "import sys; sys.modules['torch'] = None; from ds_core.cli import cli_main; cli_main(['ckpt', *sys.argv[1:]])"


class TestCkpt(SubcommandContract):
    @pytest.fixture
    def name(self):
        return "ckpt"

    @pytest.fixture
    def entry(self):
        return "ds_ckpt.cli:app"

    @pytest.fixture
    def failing(self):
        return ["show", "nowhere"]


def ds_ckpt(*arguments: object, width: int = 80) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": str(width), "TERM": "dumb", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-c", CODE, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def printed(*arguments: object) -> list[str]:
    done = ds_ckpt(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def pieces(layers: int = 3) -> list[Piece]:
    found = []
    for layer in range(layers):
        for part, shape in (("attention.qkv", (96, 32)), ("mlp", (1000, 32))):
            for kind, dtype in (("weight", "bfloat16"), ("master", "float32"), ("exp_avg", "float32")):
                of = LogicalTensor(f"model.layers.{layer}.{part}.weight", kind, shape, dtype)
                found.append(Piece(of, Chunk.whole(shape), torch.ones(shape, dtype=getattr(torch, dtype))))
    of = LogicalTensor("freqs", "buffer", (8,), "float32")
    return [*found, Piece(of, Chunk.whole((8,)), torch.zeros(8))]


@pytest.fixture
def directory(tmp_path) -> Path:
    state = {"global_steps": 12, "global_samples": 96, "precision": "Bf16", "stage": 0}
    snapshot = Snapshot(pieces(), state, {})
    ShardedCheckpoint(ShardedConfig(writers=2, chunk_bytes=2**16), None).save(tmp_path, "step12", snapshot, latest=True)
    PlainCheckpoint(None, None).save(tmp_path, "plain", snapshot, latest=False)
    return tmp_path


def test_ls(directory):
    (directory / "torn").mkdir()
    (directory / "torn" / "rank_00000-0123456789ab.safetensors").write_text("x")
    head, *rows = printed("ls", directory)
    assert head.split() == ["tag", "step", "size", "ranks", "format"]
    text = "\n".join(rows)
    for tag in ("step12 (latest)", "plain", "torn"):
        assert tag in text
    size = size_in_words(sum(file.nbytes for file in read(directory / "step12").files.values()))
    [row] = [row.split() for row in rows if row.startswith("step12")]
    assert row == ["step12", "(latest)", "12", *size.split(), "1", "ds-sharded", "1"]
    assert "cannot be loaded" in text
    assert printed("ls", directory / "torn") == [f"no checkpoint in {directory / 'torn'}"]


@pytest.mark.parametrize("tag", ["step12", "plain"])
def test_show(directory, tag):
    lines = printed("show", directory, tag)
    assert all(len(line.rstrip()) <= 80 or line.startswith(("  folder", " tensors")) for line in lines)
    text = "\n".join(lines)
    for expected in (str(directory / tag), "step 12, samples 96, precision Bf16, stage 0", "by 1 rank"):
        assert expected in text
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(("model.", "(root)", "all"))}
    assert rows["model.layers.1.mlp"] == ["32.0K", "62.5K", "125.0K", "125.0K", "312.5K"]
    assert rows["(root)"] == ["8", "32", "32"]
    assert rows["all"][0] == "105.2K"


def test_show_folds_modules(directory):
    lines = printed("show", directory, "--depth", "2")
    names = [line.split()[0] for line in lines if line.startswith(("model", "(root)", "all"))]
    assert names == ["model.layers", "(root)", "all"]
    assert "model.layers.2.mlp" in "\n".join(printed("show", directory / "step12"))


def test_show_of_many_modules_is_folded_by_itself(tmp_path):
    snapshot = Snapshot(pieces(60), {}, {})
    ShardedCheckpoint(None, None).save(tmp_path, "tag", snapshot, latest=True)
    names = [line.split()[0] for line in printed("show", tmp_path) if line.startswith("model")]
    assert names == [f"model.layers.{layer}" for layer in range(60)]


def test_verify(directory):
    done = ds_ckpt("verify", directory)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert done.stdout.startswith("2 files, ")
    assert done.stdout.endswith("all is as it was written\n")
    assert "ds-plain has no checksums" in "".join(printed("verify", directory, "plain"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_verify_names_file_and_tensor(directory):
    stored = read(directory / "step12")
    tensor = stored.tensors["model.layers.2.mlp.weight", "exp_avg", None]
    flip(directory / "step12" / tensor.chunks[0].file, tensor.chunks[0].offset + 5)
    done = ds_ckpt("verify", directory, "step12")
    assert (done.returncode, done.stdout) == (1, "")
    assert "exp_avg 'model.layers.2.mlp.weight'" in done.stderr
    assert str(directory / "step12" / tensor.chunks[0].file) in done.stderr
    assert "tag='plain'" in done.stderr
    assert "Traceback" not in done.stderr


def test_verify_names_all_files(directory):
    files = list(read(directory / "step12").files)
    for name in files:
        flip(directory / "step12" / name, 20)
    done = ds_ckpt("verify", directory)
    assert done.returncode == 1
    assert "2 of 2 files" in done.stderr
    assert all(f"{name}: the header" in done.stderr for name in files)


def test_verify_of_a_missing_or_cut_file(directory):
    [name, _] = read(directory / "step12").files
    path = directory / "step12" / name
    path.write_bytes(path.read_bytes()[:-1])
    done = ds_ckpt("verify", directory)
    assert done.returncode == 1
    assert str(path) in done.stderr
    path.unlink()
    done = ds_ckpt("verify", directory)
    assert done.returncode == 1
    assert "missing" in done.stderr


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1023 * 1024, "1023 KiB"), (10**15, "909.5 TiB")],
)
def test_sizes_in_words(nbytes, words):
    assert size_in_words(nbytes) == words


def test_diff_of_equal_ones(directory):
    done = ds_ckpt("diff", f"{directory}:step12", directory, "--tag-b", "plain", "--no-state")
    assert (done.returncode, done.stderr.strip()) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"A  ds-sharded 1, step 12, 1 rank: {directory / 'step12'}"
    assert lines[1].startswith("B  ds-plain 1")
    assert lines[-1].startswith("equal: 19 tensors, ")
    same = ds_ckpt("diff", directory, directory / "step12")
    assert same.returncode == 0
    assert "by checksum" in same.stdout
    assert "by checksum" not in ds_ckpt("diff", directory, directory, "--read").stdout


def test_diff_of_different_ones(directory):
    changed = pieces()
    changed[0].data[3, 7] += 0.5
    state = {"global_steps": 13, "global_samples": 96, "precision": "Bf16", "stage": 0}
    ShardedCheckpoint(None, None).save(directory, "step13", Snapshot(changed[:-1], state, {}), latest=False)
    done = ds_ckpt("diff", directory, f"{directory}:step13")
    assert (done.returncode, done.stderr.strip()) == (1, "")
    assert all(len(line) <= 80 for line in done.stdout.splitlines()[2:])
    text = " ".join(done.stdout.split())
    for expected in ("1 of 3.1K 0.5 0.33", "freqs buffer only in A", "global_steps 12 13"):
        assert expected in text
    assert "1 of 18 tensors" in text
    assert "1 tensor in one alone; 1 key of the state" in text
    kept = ds_ckpt("diff", directory, f"{directory}:step13", "--tolerance", "0.5", "--no-state")
    assert "0 of 18 tensors" in kept.stdout


def test_diff_of_what_cannot_be_compared(directory):
    done = ds_ckpt("diff", directory, directory / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("there is no such folder\n")
    tensor = read(directory / "step12").tensors["freqs", "buffer", None]
    flip(directory / "step12" / tensor.chunks[0].file, tensor.chunks[0].offset)
    done = ds_ckpt("diff", f"{directory}:plain", directory)
    assert (done.returncode, done.stdout) == (2, "")
    assert "buffer 'freqs' is damaged" in done.stderr
    assert "Traceback" not in done.stderr
