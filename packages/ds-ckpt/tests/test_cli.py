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
    (directory / "logs").mkdir()
    assert printed("ls", directory / "logs") == [f"no checkpoint in {directory / 'logs'}"]


def test_ls_of_a_checkpoint_itself(directory):
    _, row = printed("ls", directory / "step12")
    assert row.split()[:2] == ["step12", "12"]
    done = ds_ckpt("show", directory / "step12", "step12")
    assert done.returncode == 1
    assert "this folder is itself a checkpoint: pass no tag" in done.stderr


@pytest.mark.parametrize(
    ("latest", "line"),
    [
        ("", "latest: the file 'latest' holds b'', which is no tag"),
        ("../x", "latest: the file 'latest' holds b'../x', which is no tag"),
        ("gone", "latest: it names 'gone', and there is no such checkpoint"),
        (None, "latest: it is a folder, where a file that names a tag should be"),
    ],
)
def test_ls_says_what_is_wrong_with_latest(directory, latest, line):
    (directory / "latest").unlink()
    if latest is None:
        (directory / "latest").mkdir()
    else:
        (directory / "latest").write_text(latest)
    *rows, last = printed("ls", directory)
    assert last == line
    assert {row.split()[0] for row in rows[1:]} == {"plain", "step12"}


def test_ls_names_the_file_that_is_wrong(directory):
    [name, _] = read(directory / "step12").files
    (directory / "step12" / name).unlink()
    [row] = [row for row in lines_of("ls", directory) if row.startswith("step12")]
    assert row.endswith(f"cannot be loaded: {name}: a file of the checkpoint is missing")


def lines_of(*arguments: object) -> list[str]:
    """Return what is printed where nothing says how wide a terminal is."""
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=True
    ).stdout.splitlines()


def test_a_pipe_has_no_width(tmp_path):
    name = "model." + "a_long_name_of_a_module." * 8
    of = LogicalTensor(f"{name}weight", "weight", (8,), "float32")
    piece = Piece(of, Chunk.whole((8,)), torch.zeros(8))
    ShardedCheckpoint(None, None).save(tmp_path, "t" * 150, Snapshot([piece], {}, {}), latest=True)
    assert lines_of("ls", tmp_path)[1].startswith("t" * 150 + " (latest)")
    assert any(line.startswith(name.rstrip(".")) for line in lines_of("show", tmp_path, "--depth", "20"))


@pytest.mark.parametrize("width", [10, 20, 35])
def test_a_narrow_terminal_folds_names_and_cuts_none(directory, width):
    os.rename(directory / "plain", directory / "a_tag_with_a_name")  # noqa: PTH104
    done = ds_ckpt("ls", directory, width=width)
    assert "".join(line[:12].rstrip() for line in done.stdout.splitlines()[1:]).count("a_tag_with_a_name") == 1
    assert "…" not in done.stdout
    assert done.stdout.split()[:5] == ["tag", "step", "size", "ranks", "format"]


def test_letters_that_the_output_has_not(directory):
    os.rename(directory / "plain", directory / "größe")  # noqa: PTH104
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", CODE, "ls", str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"gr\xf6\xdfe" in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")  # noqa: PTH110
@pytest.mark.parametrize(("command", "code"), [("ls", 1), ("show", 1), ("verify", 1), ("diff", 2)])
def test_output_that_cannot_be_written(directory, command, code):
    arguments = [str(directory)] * (2 if command == "diff" else 1)
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-c", CODE, command, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == code
    assert done.stderr.startswith("the result cannot be printed: No space left on device\n  where: stdout\n")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("tag", ["step12", "plain"])
def test_show(directory, tag):
    lines = printed("show", directory, tag)
    assert all(len(line.rstrip()) <= 80 or line.startswith(("  folder", " tensors")) for line in lines)
    text = "\n".join(lines)
    for expected in (str(directory / tag), "step 12, samples 96, precision Bf16, stage 0", "by 1 rank"):
        assert expected in text
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(("model.", "(root)", "all"))}
    assert rows["model.layers.1.mlp"] == ["32.0K", "62.5KiB", "125.0KiB", "125.0KiB", "312.5KiB"]
    assert rows["(root)"] == ["8", "32B", "32B"]
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
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{directory / 'step12'}: 2 files, ")
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
    assert (done.returncode, done.stderr) == (0, "")
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
    assert (done.returncode, done.stderr) == (1, "")
    assert all(len(line) <= 80 for line in done.stdout.splitlines()[2:-1])
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


def test_a_tag_may_have_colons(directory):
    os.rename(directory / "plain", directory / "epoch:1:b")  # noqa: PTH104
    done = ds_ckpt("diff", f"{directory}:step12", f"{directory}:epoch:1:b")
    assert done.returncode == 0, done.stderr
    assert f"B  ds-plain 1, step 12, 1 rank: {directory / 'epoch:1:b'}\n" in done.stdout
    done = ds_ckpt("diff", f"{directory}:step12", f"{directory}:epoch:2")
    assert done.returncode == 2
    assert "there is no checkpoint 'epoch:2'" in done.stderr
