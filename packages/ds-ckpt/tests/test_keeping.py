"""Which checkpoints stay, which go, what is swept, and what happens where that fails."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given as examples
from hypothesis import strategies as st

import ds_core
from ds_ckpt.config import ShardedConfig
from ds_ckpt.keeping import Complete, to_remove
from ds_ckpt.sharded import ShardedCheckpoint
from ds_ckpt.tags import find_tags
from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.errors import DsError
from ds_core.interfaces.logical import Chunk, LogicalTensor, Piece, Snapshot
from ds_core.testing import crash
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here

if TYPE_CHECKING:
    from pathlib import Path

OF = LogicalTensor("w", "weight", (4,), "float32")


def given(step: int) -> Snapshot:
    return Snapshot([Piece(OF, Chunk.whole((4,)), torch.full((4,), float(step)))], {"global_steps": step}, {})


def save(directory: Path | str, step: int, *, tag: str | None = None, latest: bool = True, **options: int) -> None:
    engine = ShardedCheckpoint(ShardedConfig(**options), None)
    engine.save(directory, tag or f"step{step}", given(step), latest=latest)


def tags(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_dir())


# -- the decision -----------------------------------------------------------------------------------------------------

FOUND = st.lists(st.none() | st.integers(0, 40), max_size=12).map(
    lambda steps: [Complete(f"tag{index}", step) for index, step in enumerate(steps)]
)
COUNTS = st.none() | st.integers(1, 15)


@examples(FOUND, COUNTS, COUNTS, st.data())
def test_what_is_kept(found, keep_last, keep_every, data):
    names = [each.tag for each in found]
    protected = set(data.draw(st.lists(st.sampled_from([*names, "elsewhere"]), max_size=3)))
    removed = to_remove(found, keep_last=keep_last, keep_every=keep_every, protected=protected)
    assert not protected & set(removed)
    assert set(removed) <= set(names)
    assert removed == [name for name in names if name in removed], "oldest first"
    kept = [each for each in found if each.tag not in removed]
    assert kept or not found, "never all of them"
    if keep_last is None:
        assert removed == []
        return
    assert {each.tag for each in found[-keep_last:]} <= {each.tag for each in kept}
    multiples = {each.tag for each in found if keep_every and each.step is not None and each.step % keep_every == 0}
    assert multiples <= {each.tag for each in kept}
    # Nothing stays without a reason.
    assert {each.tag for each in kept} == {each.tag for each in found[-keep_last:]} | multiples | (
        protected & set(names)
    )


# -- folders ----------------------------------------------------------------------------------------------------------


def test_the_newest_and_every_kth_are_kept(tmp_path):
    for step in range(1, 11):
        save(tmp_path, step, keep_last=2, keep_every=4)
    assert tags(tmp_path) == ["step10", "step4", "step8", "step9"]
    assert all(tag.problem is None for tag in find_tags(tmp_path))


def test_everything_is_kept_unless_asked(tmp_path):
    for step in range(4):
        save(tmp_path, step)
    assert tags(tmp_path) == ["step0", "step1", "step2", "step3"]


def test_what_latest_names_is_kept(tmp_path):
    save(tmp_path, 1, keep_last=1)
    for step in (2, 3, 4):
        save(tmp_path, step, latest=False, keep_last=1)
    assert tags(tmp_path) == ["step1", "step4"]


def test_what_was_just_written_is_the_newest_whatever_clocks_say(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
        os.utime(tmp_path / f"step{step}" / "checkpoint.json", (2**32, 2**32))
    save(tmp_path, 3, latest=False, keep_last=1)
    assert tags(tmp_path) == ["step2", "step3"]  # which latest names


def test_saving_over_a_tag_counts_once(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, tag="same", keep_last=2)
    save(tmp_path, 4, keep_last=2)
    assert tags(tmp_path) == ["same", "step4"]


def test_what_is_not_ours_stays(tmp_path, caplog):
    PlainCheckpoint(None, None).save(tmp_path, "plain", Snapshot([], {"global_steps": 0}, {}), latest=False)
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step1" / "config.json").write_text("mine")
    (tmp_path / "step2" / "checkpoint.json").write_text('{"format": "ds-sharded"}')
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "checkpoint.json").write_text('{"format": "other"}')
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "mp_rank_00_model_states.pt").write_text("x")
    save(tmp_path, 4, keep_last=1)
    # The core's own engine is one of ours.
    assert tags(tmp_path) == ["deepspeed", "mine", "step1", "step2", "step4", "theirs"]
    assert "step1 is never removed, it holds config.json" in caplog.text
    assert "step2 is never removed, its manifest cannot be read" in caplog.text


def test_a_file_put_there_later_keeps_it_too(tmp_path, caplog):
    engine = ShardedCheckpoint(ShardedConfig(keep_last=2), None)
    for step in (1, 2, 3):
        engine.save(tmp_path, f"step{step}", given(step), latest=True)
    (tmp_path / "step2" / "KEEP.txt").write_text("mine")
    for step in (4, 5):
        engine.save(tmp_path, f"step{step}", given(step), latest=True)
    assert tags(tmp_path) == ["step2", "step4", "step5"]
    assert {tag.name: tag.problem for tag in find_tags(tmp_path)} == dict.fromkeys(["step2", "step4", "step5"])
    assert caplog.text.count("step2 is never removed, it holds KEEP.txt") == 1


# -- links ------------------------------------------------------------------------------------------------------------


def names(directory: Path) -> dict[str, str | None]:
    return {tag.name: tag.problem for tag in find_tags(directory)}


def test_a_link_to_what_was_just_written_removes_nothing(tmp_path):
    save(tmp_path, 1, tag="ckpt", keep_last=1)
    (tmp_path / "last").symlink_to("ckpt")
    for tag in ("ckpt", "last"):
        save(tmp_path, 2, tag=tag, keep_last=1)
        assert names(tmp_path) == {"ckpt": None, "last": None}


def test_a_link_is_not_counted_and_not_removed(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "last").symlink_to("step2")
    save(tmp_path, 3, keep_last=2)
    assert names(tmp_path) == {"step2": None, "last": None, "step3": None}
    save(tmp_path, 4, keep_last=1)
    assert tags(tmp_path) == ["step4"]
    assert (tmp_path / "last").is_symlink()


def test_what_latest_names_through_a_link_is_kept(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "best").symlink_to("step1")
    (tmp_path / "latest").write_text("best")
    for step in (2, 3):
        save(tmp_path, step, latest=False, keep_last=1)
    assert names(tmp_path) == {"step1": None, "best": None, "step3": None}


def test_what_is_elsewhere_is_neither_removed_nor_swept(tmp_path):
    elsewhere, directory = tmp_path / "elsewhere", tmp_path / "run"
    save(elsewhere, 1)
    leave_half(elsewhere, "torn")
    age(elsewhere / "torn", 2)
    directory.mkdir()
    for name in ("step1", "torn"):
        (directory / f"of_{name}").symlink_to(elsewhere / name)
    for step in (2, 3):
        save(directory, step, keep_last=1)
    assert tags(directory) == ["of_step1", "of_torn", "step3"]
    assert tags(elsewhere) == ["step1", "torn"]
    assert all((elsewhere / name).stat().st_nlink and any((elsewhere / name).iterdir()) for name in ("step1", "torn"))


def test_a_folder_with_a_link_for_its_manifest_is_not_swept(tmp_path):
    leave_half(tmp_path, "torn")
    age(tmp_path / "torn", 2)
    (tmp_path / "torn" / "checkpoint.json").symlink_to("checkpoint.json.tmp")
    save(tmp_path, 1)
    assert "torn" in tags(tmp_path)


def leave_half(directory: Path, tag: str) -> None:
    """Make of a whole checkpoint what a crash leaves."""
    save(directory, 99, tag=tag, latest=False)
    (directory / tag / "checkpoint.json").rename(directory / tag / "checkpoint.json.tmp")


def age(folder: Path, hours: float) -> None:
    for path in (*folder.iterdir(), folder):
        changed = path.stat().st_mtime - 3600 * hours
        os.utime(path, (changed, changed))


def test_leftovers_are_swept_when_they_are_old_and_certainly_ours(tmp_path):
    hours = {"torn": 2, "fresh": 0.5, "used": 2, "deep": 2}
    for tag in hours:
        leave_half(tmp_path, tag)
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "deep" / "inner").mkdir()
    (tmp_path / "empty").mkdir()
    for tag in hours:
        age(tmp_path / tag, hours[tag])
    age(tmp_path / "empty", 2)
    assert {tag.name for tag in find_tags(tmp_path) if tag.problem} == set(hours)
    save(tmp_path, 1)
    assert tags(tmp_path) == ["deep", "empty", "fresh", "step1", "used"]


def test_one_young_file_keeps_a_leftover(tmp_path):
    leave_half(tmp_path, "torn")
    age(tmp_path / "torn", 2)
    os.utime(next((tmp_path / "torn").glob("*.safetensors")))
    save(tmp_path, 1)
    assert "torn" in tags(tmp_path)


@pytest.mark.parametrize(("operation", "nth"), [("remove", 0), ("remove", 1), ("rmdir", 0)])
def test_what_cannot_be_removed_fails_nothing_and_is_told(operation, nth, tmp_path, caplog):
    save(tmp_path, 1)
    seen = 0

    def refuse(each: crash.Operation) -> None:
        nonlocal seen
        seen += each.name == operation
        if each.name == operation and seen == nth + 1:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with caplog.at_level(logging.WARNING), crash.watched(refuse):
        save(tmp_path, 2, keep_last=1)
    assert "an old checkpoint cannot be removed" in caplog.text
    assert "Permission denied" in caplog.text
    assert str(tmp_path / "step1") in caplog.text
    assert [tag.name for tag in find_tags(tmp_path) if tag.is_latest and not tag.problem] == ["step2"]
    left = {tag.name: tag.problem for tag in find_tags(tmp_path)}
    if operation == "remove":
        assert (left["step1"] is None) == (nth == 0), "what stays is listed"
        age(tmp_path / "step1", 2)
        save(tmp_path, 3, keep_last=1)
        assert tags(tmp_path) == ["step3"]


def test_latest_that_cannot_be_read_removes_nothing(tmp_path, caplog):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "latest").write_text("/nowhere")
    save(tmp_path, 3, latest=False, keep_last=1)
    assert tags(tmp_path) == ["step1", "step2", "step3"]
    assert "cannot be looked through" in caplog.text


def test_a_store_is_kept_in_order_too(monkeypatch):
    fs = pytest.importorskip("fsspec").filesystem("memory")
    url = "memory://keeping"
    try:
        for step in (1, 2, 3, 4):
            save(url, step, keep_last=1, keep_every=3)
        assert [tag.name for tag in find_tags(url)] == ["step3", "step4"]
        fs.rm("/keeping/step3/checkpoint.json")  # as a removal that was killed
        save(url, 5)
        assert {tag.name for tag in find_tags(url) if tag.problem} == {"step3"}
        monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 23 * 3600 * 10**9)
        save(url, 6)
        assert "step3" in {tag.name for tag in find_tags(url)}, "clocks of stores may be others"
        monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 2 * 3600 * 10**9)
        save(url, 7)
        assert [tag.name for tag in find_tags(url)] == ["step4", "step5", "step6", "step7"]
    finally:
        fs.rm("/keeping", recursive=True)


def test_it_is_set_in_the_configuration(tmp_path):
    options = {"keep_last": 2, "keep_every": 3}
    config = {"train_batch_size": 1, "checkpoint": {"engine": "sharded", "sharded": options}}
    engine, *_ = ds_core.initialize(model=torch.nn.Linear(1, 1), config=config)
    for step in range(8):
        engine.progress.global_steps = step
        engine.save_checkpoint(tmp_path)
    assert tags(tmp_path) == ["global_step0", "global_step3", "global_step6", "global_step7"]
    for name in ("global_step6", "global_step7"):
        shutil.rmtree(tmp_path / name)
    assert engine.load_checkpoint(tmp_path, tag="global_step3")[0] is not None


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_every": -1, "keep_last": 1}, {"keep_every": 5}])
def test_what_makes_no_sense_is_refused(options):
    config = {"train_batch_size": 1, "checkpoint": {"engine": "sharded", "sharded": options}}
    with pytest.raises(DsError, match="keep_"):
        ds_core.initialize(model=torch.nn.Linear(1, 1), config=config)
