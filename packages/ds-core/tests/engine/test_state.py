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
        ("save", "RuntimeError: its file is locked", "rank 1 failed: RuntimeError: its file is locked"),
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
