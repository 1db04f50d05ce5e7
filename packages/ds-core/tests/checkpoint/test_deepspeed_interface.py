"""``engine.checkpoint_engine``: DeepSpeed's engine of files."""

from __future__ import annotations

import errno
import inspect
from functools import partial
from pathlib import Path

import pytest
import torch

import ds_core
from ds_core.checkpoint import deepspeed_interface
from ds_core.checkpoint.deepspeed_interface import CheckpointCommitInfo, CheckpointEngine, TorchFiles
from ds_core.errors import CheckpointError, EngineError
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here

INFO = CheckpointCommitInfo("tag", "runs", True)


@pytest.fixture
def files():
    return TorchFiles(lambda: None)


def test_the_methods_are_deepspeeds() -> None:
    """Those of spec/checkpoint.md 13.1, with its parameters."""
    expected = {
        "create": ["info"],
        "save": ["state_dict", "path"],
        "load": ["path", "map_location"],
        "commit": ["info"],
        "makedirs": ["path", "exist_ok"],
        "is_data_parallel_writer": ["dp_rank"],
        "is_decoupled": [],
        "set_commit_info": ["info"],
        "get_commit_info": [],
        "cleanup": [],
        "preserves_storage_sharing": [],
    }
    for name, parameters in expected.items():
        for cls in (CheckpointEngine, TorchFiles):
            assert list(inspect.signature(getattr(cls, name)).parameters)[1:] == parameters, name


def test_what_an_engine_need_not_say(files: TorchFiles, tmp_path: Path) -> None:
    assert [files.is_data_parallel_writer(rank) for rank in range(3)] == [True, False, False]
    assert not files.is_decoupled()
    assert files.preserves_storage_sharing()
    files.create(INFO)
    files.set_commit_info(INFO)
    assert files.get_commit_info() is None
    files.cleanup()
    files.makedirs(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(FileExistsError):
        files.makedirs(str(tmp_path / "a" / "b"))
    files.makedirs(str(tmp_path / "a" / "b"), exist_ok=True)


def test_files_come_back(files: TorchFiles, tmp_path: Path) -> None:
    path = str(tmp_path / "one.pt")
    for value in (1.0, 2.0):
        files.save({"w": torch.full((3,), value), "step": 7, "names": ["a"]}, path)
        found = files.load(path, map_location="cpu")
        assert torch.equal(found["w"], torch.full((3,), value))
        assert (found["step"], found["names"]) == (7, ["a"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["one.pt"]


class Anything:
    pass


def test_nothing_but_tensors_and_plain_values_is_unpickled(files: TorchFiles, tmp_path: Path) -> None:
    torch.save({"w": Anything()}, tmp_path / "one.pt")
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        files.load(tmp_path / "one.pt")


def test_what_cannot_be_read_says_why(files: TorchFiles, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        files.load(tmp_path / "nowhere.pt")
    torch.save({"w": torch.ones(100)}, tmp_path / "half.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "half.pt").read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"half\.pt"):
        files.load(tmp_path / "half.pt")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(CheckpointError, match=r"empty\.pt"):
        files.load(tmp_path / "empty.pt")


def test_a_save_that_fails_leaves_what_was_there(
    files: TorchFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.pt"
    files.save({"w": 1}, path)

    def full(content, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        files.save({"w": 2}, path)
    assert files.load(path) == {"w": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["one.pt"]
    with pytest.raises(CheckpointError, match="missing"):
        files.save({"w": 2}, tmp_path / "missing" / "one.pt")


def test_an_engine_has_one_that_commits_its_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, *_ = ds_core.initialize(model=torch.nn.Linear(1, 1), config={"train_batch_size": 1, "log_level": "error"})
    committed = []
    monkeypatch.setattr(engine.parts.checkpoint, "commit", lambda: committed.append(True))
    files = engine.checkpoint_engine
    assert isinstance(files, deepspeed_interface.CheckpointEngine)
    assert files.commit(INFO) is True
    assert files.commit() is True
    assert committed == [True, True]
    engine.destroy()
    with pytest.raises(EngineError, match="destroyed"):
        files.commit()


def test_destroy_closes_and_lets_everything_go_also_where_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, *_ = ds_core.initialize(model=torch.nn.Linear(1, 1), config={"train_batch_size": 1, "log_level": "error"})

    def close():
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(engine.parts.checkpoint, "close", close)
    with pytest.raises(CheckpointError, match="the disk is full"):
        engine.destroy()
    assert engine.is_destroyed
    with pytest.raises(EngineError, match="destroyed"):
        engine.save_checkpoint("runs")
    engine.destroy()


@pytest.mark.parametrize("place", ["s3://bucket/x.pt", Path("s3://bucket/x.pt")])
def test_files_are_on_this_machine(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    files = TorchFiles(lambda: None)
    for act in (partial(files.save, {}), files.load, files.makedirs):
        with pytest.raises(CheckpointError, match=r"no URL such as s3://|lost one of its slashes"):
            act(place)
    assert not list(tmp_path.iterdir())
