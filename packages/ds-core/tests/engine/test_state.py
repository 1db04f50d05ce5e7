"""Saving and loading as one act of all ranks: whatever one of them meets, the others hear of it and none waits."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch

import ds_core
from ds_core import comm
from ds_core.checkpoint.plain import PlainReader
from ds_core.errors import CheckpointError
from ds_core.testing.ranks import expect_rank_errors, run_ranks

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "checkpoint": {"engine": "plain"},
}


class WithExtraState(torch.nn.Linear):
    """Has state of its own, which cannot always be had or set on rank 1."""

    breaks = ""

    def get_extra_state(self) -> dict[str, int]:
        if self.breaks == "save" and comm.get_rank() == 1:
            raise RuntimeError("its file is locked")
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        if self.breaks == "load" and comm.get_rank() == 1:
            raise ZeroDivisionError("calls per second")
        self.loaded = state


def start():
    return ds_core.initialize(model=WithExtraState(3, 1), config=CONFIG)[0]


def break_on_rank_1(folder: Path, when: str) -> None:
    engine = start()
    engine.module.breaks = when
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)


@pytest.mark.parametrize(
    ("when", "own", "told"),
    [
        (
            "save",
            (
                "CheckpointError: the checkpoint cannot be written: RuntimeError: its file is locked\n"
                "  where: save_checkpoint"
            ),
            "CheckpointError: rank 1 failed: the checkpoint cannot be written: RuntimeError: its file is locked",
        ),
        ("load", "ZeroDivisionError: calls per second", "rank 1 failed: ZeroDivisionError: calls per second"),
    ],
)
def test_any_error_of_one_rank_reaches_all(when, own, told, tmp_path):
    errors = expect_rank_errors(partial(break_on_rank_1, tmp_path, when), 2, timeout_s=20)
    assert sorted(errors) == [0, 1]
    assert errors[1] == own
    assert told in errors[0]
    assert (tmp_path / "latest").exists() is (when == "load")


def tags_differ(folder: Path) -> tuple[dict, list[str]]:
    """Save under two tags with the default of ``tag_validation``; return what is loaded, and the warnings here."""
    engine = start()
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: warnings.append(entry.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ds_core").addHandler(handler)
    engine.save_checkpoint(folder, tag=f"of_rank_{comm.get_rank()}")
    logging.getLogger("ds_core").removeHandler(handler)
    engine.load_checkpoint(folder)
    return engine.module.loaded, warnings


def refused(act, *arguments, **options) -> tuple[str, str]:
    """Return what is wrong, and where, as ``act`` says."""
    with pytest.raises(CheckpointError) as caught:
        act(*arguments, **options)
    return caught.value.what, caught.value.where


def ranks_ask_for_other_things(folder: Path) -> list[tuple[str, str]]:
    rank = comm.get_rank()
    engine = start()
    for tag in ("first", "second"):
        engine.save_checkpoint(folder, tag)
    torch.nn.init.zeros_(engine.module.weight)
    found = [
        refused(engine.load_checkpoint, folder, ("first", "second")[rank]),
        refused(engine.load_checkpoint, folder, (None, "second")[rank]),
        refused(engine.load_checkpoint, folder / ("", "..")[rank], "first"),
        refused(engine.load_checkpoint, folder, load_module_only=rank == 1),
        refused(engine.load_checkpoint, folder, ("first", "../first")[rank]),
        refused(engine.load_checkpoint, (folder, Path("s3://bucket"))[rank], "first"),
        refused(engine.save_checkpoint, folder, exclude_frozen_parameters=rank == 1),
    ]
    assert not engine.module.weight.any(), "nothing may have changed"
    engine.load_checkpoint(folder, "first")
    assert engine.module.weight.any(), "and the ranks are in step"
    return found


def ranks_find_other_things(folder: Path) -> list[tuple[str, str]]:
    rank = comm.get_rank()
    engine = start()
    checkpoint = engine.parts.checkpoint
    engine.save_checkpoint(folder, "first")
    engine.save_checkpoint(folder, "second")
    path, _ = engine.load_checkpoint(folder)
    read = type(checkpoint).read_latest
    type(checkpoint).read_latest = lambda self, directory: "first" if rank else read(self, directory)
    assert engine.load_checkpoint(folder)[0] == path, "rank 0's counts"
    before = engine.module.weight.detach().clone()
    torch.nn.init.zeros_(engine.module.weight)
    find = type(checkpoint).open

    def find_another(self, directory, tag):
        """Do as if somebody saved between the two ranks."""
        return find(self, directory, "first" if rank else tag)

    type(checkpoint).open = find_another
    found = [refused(engine.load_checkpoint, folder, "second")]
    assert not engine.module.weight.any(), "nothing may have changed"
    type(checkpoint).open, type(checkpoint).read_latest = find, read
    engine.load_checkpoint(folder)
    assert torch.equal(engine.module.weight, before)
    return found


def test_ranks_load_one_checkpoint_or_none(tmp_path):
    asked, found = run_ranks(
        [
            partial(ranks_ask_for_other_things, tmp_path / "asked"),
            partial(ranks_find_other_things, tmp_path / "found"),
        ],
        2,
        timeout_s=20,
    )
    for ours in asked:
        assert [what.removeprefix("rank 1 failed: ") for what, _ in ours] == [
            "ranks load with different tag: rank 1 'second', rank 0 'first'",
            "ranks load with different tag: rank 1 'second', rank 0 None",
            (
                f"ranks load with different load_dir: rank 1 {str(tmp_path / 'asked' / '..')!r}, "
                f"rank 0 {str(tmp_path / 'asked')!r}"
            ),
            "ranks load with different load_optimizer_states: rank 1 False, rank 0 True",
            "tag '../first' cannot name a checkpoint",
            "the path 's3:/bucket' was made of a URL, and lost one of its slashes",
            "ranks pass different exclude_frozen_parameters: rank 1 True, rank 0 False",
        ]
    assert found[0] == found[1]
    assert found[0][0][0] == "rank 1 found another checkpoint than rank 0 under the tag 'second'"


def client_states_differ(folder: Path) -> tuple[list[str], object]:
    rank = comm.get_rank()
    engine = start()
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: warnings.append(entry.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ds_core").addHandler(handler)
    engine.save_checkpoint(folder, client_state={"epoch": 1} if rank == 0 else None)
    engine.save_checkpoint(folder, client_state={"epoch": 1})
    assert warnings == []
    for _ in range(2):
        engine.save_checkpoint(folder, client_state={"epoch": rank})
    logging.getLogger("ds_core").removeHandler(handler)
    return warnings, engine.load_checkpoint(folder)[1]


def test_a_client_state_that_differs_is_warned_of_once(tmp_path):
    [(first, second)] = run_ranks([partial(client_states_differ, tmp_path)], 2, timeout_s=20)
    assert first == (["the client_state of rank 1 differs from rank 0's: only rank 0's is saved"], {"epoch": 0})
    assert second == ([], {"epoch": 0})


@pytest.mark.parametrize("key", ["loss_scale", "plan", "precision", "global_steps", "excluded", "client_state"])
def test_a_state_without_what_every_engine_saves_is_refused(key, tmp_path):
    engine = start()
    engine.save_checkpoint(tmp_path, "ours")
    manifest = tmp_path / "ours" / "checkpoint.json"
    content = json.loads(manifest.read_text())
    content["state"][key] = [[]]
    if key != "excluded":
        manifest.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=rf"the state of the checkpoint has '\[\[\]\]' as '{key}'"):
            engine.load_checkpoint(tmp_path)
    del content["state"][key]
    manifest.write_text(json.dumps(content))
    torch.nn.init.zeros_(engine.module.weight)
    with pytest.raises(CheckpointError, match=f"the state of the checkpoint has no '{key}'") as caught:
        engine.load_checkpoint(tmp_path)
    assert caught.value.where == str(tmp_path / "ours")
    assert not engine.module.weight.any(), "nothing may have changed"


def test_tags_that_differ_become_rank_0s_with_one_warning(tmp_path):
    [(first, second)] = run_ranks([partial(tags_differ, tmp_path)], 2)
    assert first[0] == second[0] == {"calls": 3}
    assert (tmp_path / "latest").read_text() == "of_rank_0"
    assert not (tmp_path / "of_rank_1").exists()
    [warning] = first[1]
    assert "rank 1 under 'of_rank_1'" in warning
    assert second[1] == [], "rank 0 speaks for all"


def load_what_others_wrote(folder: Path) -> None:
    engine = start()
    engine.save_checkpoint(folder, tag="ours")
    manifest = folder / "ours" / "checkpoint.json"
    content = json.loads(manifest.read_text())
    del content["state"]["optimizer"]
    content["state"]["optimizer_missing"] = "it numbers parameters and does not name them"
    manifest.write_text(json.dumps(content))
    weight = engine.module.weight.detach().clone()
    torch.nn.init.zeros_(engine.module.weight)
    with pytest.raises(CheckpointError, match="cannot be loaded: it numbers parameters") as caught:
        engine.load_checkpoint(folder)
    assert "load_optimizer_states=False" in caught.value.fix
    assert not engine.module.weight.any(), "nothing may have changed"
    PlainReader.rank_state = lambda self, rank: {}
    torch.manual_seed(5)
    generator = torch.get_rng_state()
    engine.load_checkpoint(folder, load_optimizer_states=False)
    assert torch.equal(engine.module.weight, weight)
    assert torch.equal(torch.get_rng_state(), generator), "generators that were not saved go on as they are"
    torch.nn.init.zeros_(engine.module.weight)
    engine.load_checkpoint(folder, load_module_only=True)
    assert torch.equal(engine.module.weight, weight)


def test_what_others_wrote_may_lack_the_optimizer_and_generators(tmp_path):
    run_ranks([partial(load_what_others_wrote, tmp_path)], 1, timeout_s=20)


def test_a_url_is_refused_by_an_engine_that_knows_of_paths_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = start()
    for act in (engine.save_checkpoint, engine.load_checkpoint):
        with pytest.raises(CheckpointError, match="PlainCheckpoint takes paths, and no URL such as s3://") as caught:
            act("s3://bucket/run")
        assert "ds-ckpt" in caught.value.fix
        assert "sharded" in caught.value.fix
    assert not list(tmp_path.iterdir())


def test_a_path_that_was_made_of_a_url_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = start()
    for act in (engine.save_checkpoint, engine.load_checkpoint):
        with pytest.raises(CheckpointError, match="lost one of its slashes"):
            act(Path("s3://bucket/run"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "s3:").mkdir()  # somebody means it
    engine.save_checkpoint(Path("s3:/run"))
    engine.load_checkpoint("s3:/run")


def test_a_url_reaches_an_engine_that_takes_it_as_text(monkeypatch):
    engine = start()
    seen = []
    checkpoint = type(engine.parts.checkpoint)
    monkeypatch.setattr(checkpoint, "takes_urls", True)
    monkeypatch.setattr(
        checkpoint, "save", lambda _self, directory, tag, *_rest, **_options: seen.append((directory, tag))
    )
    monkeypatch.setattr(checkpoint, "read_latest", lambda _self, directory: seen.append(directory) or "tag")
    engine.save_checkpoint("s3://bucket/run", tag="tag")
    with pytest.raises(CheckpointError):
        engine.load_checkpoint("s3://bucket/run")
    assert seen == [("s3://bucket/run", "tag"), "s3://bucket/run"]
