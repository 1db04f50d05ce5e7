"""The engine ``async`` beside its contract: who waits for whom, and what calls in which order do."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import ds_core
from ds_ckpt import keeping
from ds_ckpt.background import AsyncCheckpoint
from ds_ckpt.config import AsyncConfig
from ds_ckpt.formats import read
from ds_ckpt.sharded import ShardedCheckpoint
from ds_core.checkpoint import flight
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Chunk, LogicalTensor, Piece, Snapshot
from ds_core.testing.checkpoint import check_content, save_and_commit, snapshot
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.memory import LiveStorage
from ds_core.testing.ranks import run_ranks

CONFIG = {
    "train_batch_size": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
    "checkpoint": {"engine": "async", "async": {"writers": 2}},
    "log_level": "error",
}


class Gate:
    """Holds saves back until somebody waits for one, and notes what happens in which order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.seen = threading.Event(), []
        write, wait = ShardedCheckpoint._write_own, flight.Flight.wait

        def write_later(engine, folder, *rest):
            assert self.open.wait(60)
            self.seen.append(f"begin {folder.name}")
            done = write(engine, folder, *rest)
            self.seen.append(f"end {folder.name}")
            return done

        def wait_for(one):
            self.seen.append("wait")
            self.open.set()
            wait(one)

        monkeypatch.setattr(ShardedCheckpoint, "_write_own", write_later)
        monkeypatch.setattr(flight.Flight, "wait", wait_for)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


@pytest.fixture
def trained():
    """An engine after a step, and its weights."""
    torch.manual_seed(0)
    engine, *_ = ds_core.initialize(model=torch.nn.Linear(8, 4), config=CONFIG)
    step(engine)
    yield engine
    flight.forget()


def step(engine):
    engine.backward(engine(torch.ones(2, 8)).square().mean())
    engine.step()


def weights(engine):
    return {name: value.clone() for name, value in engine.module.state_dict().items()}


def test_a_save_returns_before_it_is_written_and_the_next_one_waits(tmp_path, gate):
    engine = AsyncCheckpoint(None, None)
    engine.save(tmp_path, "first", snapshot(1), latest=True)
    assert gate.seen == []
    assert list(tmp_path.iterdir()) == []
    engine.save(tmp_path, "second", snapshot(2), latest=True)
    engine.commit()
    assert gate.seen[:3] == ["wait", "begin first", "end first"]
    assert [what for what in gate.seen if "second" in what] == ["begin second", "end second"]
    check_content(engine, tmp_path, "first", 1)
    check_content(engine, tmp_path, "second", 2)


def test_manifests_are_read_once_over_many_saves(tmp_path, monkeypatch):
    looked, look = [], keeping._read

    def noted(folder):
        looked.append(folder.name)
        return look(folder)

    monkeypatch.setattr(keeping, "_read", noted)
    engine = AsyncCheckpoint(AsyncConfig(keep_last=3), None)
    for version in range(1, 6):
        engine.save(tmp_path, f"tag{version}", snapshot(version), latest=True)
    engine.close()
    engine.save(tmp_path, "tag6", snapshot(6), latest=True)
    engine.commit()
    assert looked == [f"tag{version}" for version in range(1, 7)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "tag4", "tag5", "tag6"]


def test_extra_memory_is_one_copy_of_what_is_written_here(tmp_path):
    def large(writer):
        of = LogicalTensor(f"w{writer}", "weight", (512, 512), "float32")
        return Piece(of, Chunk.whole(of.shape), torch.zeros(512, 512).t(), writer)

    mine, theirs = large(0), large(1)
    engine = AsyncCheckpoint(None, None)
    given = Snapshot([mine, mine, theirs], {}, {})
    with LiveStorage() as live:
        for tag in ("first", "second"):
            engine.save(tmp_path, tag, given, latest=True)
            engine.commit()
    assert live.peak_bytes == mine.data.nbytes
    engine.close()
    assert engine._memory.nbytes == 0


def test_a_store_is_written_in_the_background_too(gate):
    engine, url = AsyncCheckpoint(None, None), "memory://test_background/run"
    engine.save(url, "tag", snapshot(1), latest=True)
    assert gate.seen == []
    engine.commit()
    check_content(engine, url, engine.read_latest(url), 1)


def test_a_bad_state_is_refused_at_once(tmp_path):
    engine = AsyncCheckpoint(None, None)
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        engine.save(tmp_path, "tag", Snapshot([], {"bad": object()}, {}), latest=True)
    engine.commit()
    assert list(tmp_path.iterdir()) == []


def test_an_engine_trains_on_while_it_saves(tmp_path, trained, gate):
    saved = weights(trained)
    trained.save_checkpoint(tmp_path, client_state={"epoch": 3})
    for _ in range(3):
        step(trained)
    assert gate.seen == []
    path, client = trained.load_checkpoint(tmp_path)
    assert (path, client) == (str(tmp_path / "global_step1"), {"epoch": 3})
    assert all(torch.equal(value, saved[name]) for name, value in weights(trained).items())
    trained.destroy()


def test_destroy_waits(tmp_path, trained, gate):
    trained.save_checkpoint(tmp_path)
    trained.destroy()
    assert gate.seen[-1] == "end global_step1"
    assert (tmp_path / "latest").read_text() == "global_step1"


@pytest.mark.parametrize("call", ["destroy", "save", "load", "commit"])
def test_every_call_that_waits_tells_of_a_failure(tmp_path, trained, call):
    (tmp_path / "blocked").write_text("a file where the folder should be")
    trained.save_checkpoint(tmp_path, tag="blocked")
    calls = {
        "destroy": trained.destroy,
        "save": partial(trained.save_checkpoint, tmp_path, tag="next"),
        "load": partial(trained.load_checkpoint, tmp_path),
        "commit": trained.checkpoint_engine.commit,
    }
    with pytest.raises(CheckpointError, match="blocked"):
        calls[call]()
    assert flight._untold == []
    assert not (tmp_path / "next").exists()
    trained.destroy()
    assert trained.is_destroyed


def test_several_engines_save_at_the_same_time(tmp_path, trained):
    other, *_ = ds_core.initialize(model=torch.nn.Linear(3, 3), config=CONFIG)
    for engine, name in ((trained, "a"), (other, "b"), (trained, "a2"), (other, "b2")):
        engine.save_checkpoint(tmp_path, tag=name)
    trained.destroy()
    other.checkpoint_engine.commit()
    assert (tmp_path / "latest").read_text() == "b2"
    for name in ("a", "b", "a2", "b2"):
        assert read(tmp_path / name).files
    other.destroy()


def test_options_are_those_of_sharded(tmp_path, trained):
    assert trained.parts.checkpoint.options.writers == 2
    assert trained.report()["checkpoint"].startswith("AsyncCheckpoint")
    with pytest.raises(ds_core.DsError, match="writer"):
        ds_core.initialize(
            model=torch.nn.Linear(1, 1), config={**CONFIG, "checkpoint": {"engine": "async", "async": {"writer": 2}}}
        )


SCRIPT = """
import json, sys, torch, ds_core
engine, *_ = ds_core.initialize(model=torch.nn.Linear(8, 4), config=json.loads(sys.argv[1]))
engine.save_checkpoint(sys.argv[2], tag="tag")
print("the script has ended", flush=True)
"""


def run(folder: Path, script: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, json.dumps(CONFIG), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_a_script_that_ends_after_a_save_has_saved(tmp_path):
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (0, "the script has ended\n"), done.stderr
    assert done.stderr == ""
    assert (tmp_path / "latest").read_text() == "tag"
    assert read(tmp_path / "tag").files


@pytest.mark.parametrize("after", ["", "engine.destroy()", "del engine", "ds_core.comm.destroy_process_group()"])
def test_a_script_whose_save_fails_ends_with_an_error(tmp_path, after):
    (tmp_path / "tag").write_text("a file where the folder should be")
    done = run(tmp_path, f"{SCRIPT}\n{after}\n")
    assert done.returncode == 1
    assert done.stdout == "the script has ended\n"
    assert "the checkpoint cannot be written" in done.stderr
    assert str(tmp_path / "tag") in done.stderr


# -- ranks ------------------------------------------------------------------------------------------------------------


def _given(version):
    import torch.distributed as dist

    return snapshot(version, rank=dist.get_rank(), world_size=2, parts=2)


def _engine():
    import torch.distributed as dist

    return AsyncCheckpoint(None, dist.group.WORLD)


def _the_group_goes_once_it_is_written(directory):
    with pytest.MonkeyPatch.context() as patch:
        gate, engine = Gate(patch), _engine()
        engine.save(Path(directory), "tag", _given(1), latest=True)
        ds_core.comm.destroy_process_group()
        assert gate.seen[0] == "wait"
        engine.commit()
        engine.close()
    check_content(AsyncCheckpoint(None, None), Path(directory), "tag", 1)


def _the_group_goes_without_waiting(directory):
    """As a script does that calls torch: a gloo group goes on for as long as somebody holds it."""
    import torch.distributed as dist

    gate, save = threading.Event(), ShardedCheckpoint.save

    def save_later(*args, **options):
        assert gate.wait(60)
        save(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedCheckpoint, "save", save_later)
        engine = _engine()
        engine.save(Path(directory), "early", _given(1), latest=True)
        dist.destroy_process_group()
        gate.set()
        engine.commit()
        engine.close()
    check_content(AsyncCheckpoint(None, None), Path(directory), "early", 1)


def _lost(*, destroyed):
    """What is said where the ranks cannot talk any more."""
    import torch.distributed as dist

    gate = threading.Event()

    def save(*args, **options):
        assert gate.wait(60)
        raise RuntimeError("[gloo] Connection closed by peer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedCheckpoint, "save", save)
        engine = _engine()
        engine.save(Path("nowhere"), "lost", _given(1), latest=True)
        if destroyed:
            dist.destroy_process_group()
        gate.set()
        with pytest.raises(CheckpointError) as caught:
            engine.commit()
        engine.commit()
        engine.close()
    if destroyed:
        assert "the process group was destroyed" in caught.value.what
        assert "call engine.destroy()" in caught.value.fix
    else:
        assert "the ranks lost each other" in caught.value.what
        assert "Connection closed by peer" in caught.value.what


def _the_manifest_is_that_of_sharded(directory):
    """Two ranks, each with pieces that the other one writes, and a state of its own."""
    import torch.distributed as dist

    ShardedCheckpoint(None, dist.group.WORLD).save(Path(directory), "sync", _given(1), latest=False)
    engine = _engine()
    engine.save(Path(directory), "async", _given(1), latest=False)
    engine.close()
    sync, background = read(Path(directory) / "sync"), read(Path(directory) / "async")
    assert [tensor.of for tensor in sync.tensors.values()] == [tensor.of for tensor in background.tensors.values()]
    assert list(sync.tensors) == list(background.tensors), "in the order of the model"
    for key, tensor in sync.tensors.items():
        other = background.tensors[key].chunks
        # The names of files have the id of the save.
        assert [replace(chunk, file="") for chunk in tensor.chunks] == [replace(chunk, file="") for chunk in other]
        assert [chunk.file.partition("-")[0] for chunk in tensor.chunks] == [c.file.partition("-")[0] for c in other]
    assert {chunk.file[:10] for tensor in sync.tensors.values() for chunk in tensor.chunks} == {
        "rank_00000",
        "rank_00001",
    }
    assert (sync.state, sync.rank_states) == (background.state, background.rank_states)
    assert [state["rank"] for state in background.rank_states] == [0, 1]


def _training_talks_while_it_saves(directory):
    """Collectives of both interleave differently on each rank."""
    import torch.distributed as dist

    engine, total = _engine(), torch.ones(1)
    for version in range(1, 4):
        engine.save(Path(directory), f"tag{version}", _given(version), latest=True)
        for _ in range(20 if dist.get_rank() else 1):
            torch.ones(100, 100) @ torch.ones(100, 100)
        dist.all_reduce(total)
    assert total.item() == 8
    engine.close()
    engine.save(Path(directory), "after", _given(4), latest=True)
    engine.close()


def _a_group_of_some_ranks(directory):
    import torch.distributed as dist

    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [1, 2])]
    if dist.get_rank() < 2:
        with pytest.raises(CheckpointError, match="this engine has 2 of 3"):
            AsyncCheckpoint(None, pairs[0]).save(Path(directory), "tag", _given(1), latest=True)


def test_on_two_ranks(tmp_path):
    folder = str(tmp_path)
    run_ranks(
        [
            partial(_the_group_goes_once_it_is_written, folder),
            partial(_the_group_goes_without_waiting, folder),
            partial(_lost, destroyed=True),
            partial(_lost, destroyed=False),
            partial(_the_manifest_is_that_of_sharded, str(tmp_path / "alike")),
            partial(_training_talks_while_it_saves, folder),
        ],
        2,
    )
    reading = AsyncCheckpoint(None, None)
    for tag, version in (("tag1", 1), ("tag2", 2), ("tag3", 3), ("after", 4), ("early", 1)):
        check_content(reading, tmp_path, tag, version)
    assert reading.read_latest(tmp_path) == "after"


def _one_thread_cannot_start(directory):
    """Then no rank's thread begins, and nobody waits for one; the next save is as ever."""
    import torch.distributed as dist

    def start_none(thread):
        raise RuntimeError("can't start new thread")

    engine = _engine()
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(flight.threading.Thread, "start", start_none)
        with pytest.raises(CheckpointError, match="cannot be started: can't start new thread"):
            engine.save(Path(directory), "none", _given(1), latest=True)
    engine.commit()
    assert not (Path(directory) / "none").exists()
    engine.save(Path(directory), "tag", _given(2), latest=True)
    engine.close()


def _one_rank_loads_from_nowhere(directory):
    """While a save is in flight: the ranks wait for it together, or not at all."""
    import torch.distributed as dist

    trained, *_ = ds_core.initialize(model=torch.nn.Linear(8, 4), config=CONFIG)
    step(trained)
    trained.save_checkpoint(directory, "tag")
    with pytest.raises(CheckpointError, match="lost one of its slashes"):
        trained.load_checkpoint(Path("s3://x/y") if dist.get_rank() else directory, "tag")
    trained.load_checkpoint(directory, "tag")
    trained.destroy()


def _one_rank_is_without_the_store(directory):
    """Such as a host where its package is missing; for both engines."""
    import torch.distributed as dist

    from ds_ckpt import sharded

    def find(place):
        if dist.get_rank() == 1:
            raise CheckpointError("memory:// needs a package that is not installed")
        return folder_at(place)

    folder_at = sharded.folder_at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "folder_at", find)
        for engine in (_engine(), ShardedCheckpoint(None, dist.group.WORLD)):
            with pytest.raises(CheckpointError, match="needs a package that is not installed"):
                save_and_commit(engine, directory, "tag", _given(1))
            engine.close()
    engine = ShardedCheckpoint(None, dist.group.WORLD)
    engine.save(directory, "tag", _given(1), latest=True)


def test_what_one_rank_cannot_do_is_told_to_all(tmp_path):
    cases = (_one_thread_cannot_start, _one_rank_loads_from_nowhere, _one_rank_is_without_the_store)
    run_ranks([partial(case, str(tmp_path / case.__name__)) for case in cases], 2, timeout_s=20)
    check_content(AsyncCheckpoint(None, None), tmp_path / "_one_thread_cannot_start", "tag", 2)


def test_a_group_that_is_not_the_whole_job_is_refused(tmp_path):
    run_ranks([partial(_a_group_of_some_ranks, str(tmp_path))], 3)
