"""The names in a checkpoint folder: what a tag may be, which tags are complete, and what ``latest`` says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ds_core.checkpoint.folder import MANIFEST, check_tag, complete_tags, read_latest, write_latest
from ds_core.errors import CheckpointError, NoCheckpointError


@pytest.mark.parametrize("tag", ["step_100", "a b", "1.5", "latest2", ".hidden", 7])
def test_plain_names_are_tags(tag):
    assert check_tag(tag) == str(tag)


# "latest.tmp" is what ``latest`` is written as before it gets its name: a folder there would end all later saves.
@pytest.mark.parametrize("tag", ["", ".", "..", "latest", "latest.tmp", "a/b", "/a", "a\\b", "../a", "a\0b"])
def test_a_name_that_leads_elsewhere_is_refused(tag):
    with pytest.raises(CheckpointError, match="cannot name a checkpoint") as caught:
        check_tag(tag)
    assert repr(tag) in caught.value.what
    assert caught.value.where == "tag"
    assert caught.value.fix


# "latest" is read without the spaces around what it holds, and what was written there is one line.
@pytest.mark.parametrize("tag", [" a", "a ", "a\n", "a\nb", "\ta", "a\x7f", "a\x85", "a\u2028", "a\udc80"])
def test_a_name_that_latest_cannot_hold_is_refused(tag):
    with pytest.raises(CheckpointError, match="cannot name a checkpoint"):
        check_tag(tag)


@pytest.mark.parametrize("tag", ["checkpoint.json", "checkpoint.json.tmp", "latest_universal"])
def test_names_of_files_are_no_tags(tag):
    with pytest.raises(CheckpointError, match="cannot name a checkpoint"):
        check_tag(tag)


def test_a_tag_that_is_removed_meanwhile_is_left_out(tmp_path, monkeypatch):
    for tag in ("a", "b", "c"):
        (tmp_path / tag).mkdir()
        (tmp_path / tag / MANIFEST).write_text("{}")
    found = Path.stat

    def removed(path, **options):
        status = found(path, **options)
        if path.name == MANIFEST and path.parent.name == "b":
            path.unlink(missing_ok=True)
            return found(path, **options)
        return status

    monkeypatch.setattr(Path, "stat", removed)
    assert sorted(complete_tags(tmp_path)) == ["a", "c"]


def test_complete_tags_are_those_with_a_manifest_newest_last(tmp_path):
    assert complete_tags(tmp_path / "nowhere") == []
    assert complete_tags(tmp_path) == []
    for age, tag in enumerate(["b", "c", "a"]):
        (tmp_path / tag).mkdir()
        (tmp_path / tag / MANIFEST).write_text("{}")
        os.utime(tmp_path / tag / MANIFEST, (1000 + age, 1000 + age))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / f"{MANIFEST}.tmp").write_text("{}")
    (tmp_path / "odd" / MANIFEST).mkdir(parents=True)
    (tmp_path / MANIFEST).write_text("not in a tag")
    assert complete_tags(tmp_path) == ["b", "c", "a"]


def test_tags_of_the_same_time_are_sorted_by_name(tmp_path):
    for tag in ("b", "a", "c"):
        (tmp_path / tag).mkdir()
        (tmp_path / tag / MANIFEST).write_text("{}")
        os.utime(tmp_path / tag / MANIFEST, (1000, 1000))
    assert complete_tags(tmp_path) == ["a", "b", "c"]


def test_latest_is_what_was_written_last(tmp_path):
    for tag in ("first", "second, which is longer", "c"):
        write_latest(tmp_path, tag)
        assert read_latest(tmp_path) == tag
        assert (tmp_path / "latest").read_text() == tag
    (tmp_path / "latest").write_text(" edited\n")
    assert read_latest(tmp_path) == "edited"


def test_without_latest_the_error_lists_what_could_be_loaded(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        read_latest(tmp_path / "nowhere")
    assert "nowhere" in caught.value.what
    with pytest.raises(CheckpointError, match="there is no file 'latest'") as caught:
        read_latest(tmp_path)
    assert caught.value.fix == "check the path: no checkpoint is in it"
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="there is no file 'latest'") as caught:
        read_latest(tmp_path)
    assert caught.value.fix == "pass tag=, one of one"


@pytest.mark.parametrize("content", [b"", b"\xffag", b"/etc", b"../elsewhere", b"..", b"a\0b", b"x" * 5000 + b"/"])
def test_a_latest_that_names_no_tag_is_refused(tmp_path, content):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "checkpoint.json").write_text("{}")
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"'latest' holds .* which is no tag") as caught:
        read_latest(tmp_path)
    assert caught.value.where == str(tmp_path)
    assert "whole" in caught.value.fix
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_a_latest_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latest").mkdir()
    with pytest.raises(CheckpointError, match="'latest' cannot be read: it is no regular file"):
        read_latest(tmp_path)


def test_a_latest_that_never_ends_or_begins_is_not_read(tmp_path):
    latest = tmp_path / "latest"
    (tmp_path / "tag").write_text("tag")
    for target, why in (("/dev/zero", "it is a link"), ("tag", "it is a link"), ("nowhere", "it is a link")):
        latest.symlink_to(target)
        with pytest.raises(CheckpointError, match=f"'latest' cannot be read: {why}"):
            read_latest(tmp_path)
        latest.unlink()
    os.mkfifo(latest)
    with pytest.raises(CheckpointError, match="'latest' cannot be read: it is no regular file"):
        read_latest(tmp_path)
    latest.unlink()
    with latest.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="and more, which is no tag"):
        read_latest(tmp_path)
    latest.write_text(" " * 4092 + "tag\n")
    assert read_latest(tmp_path) == "tag"


def test_nothing_there_is_told_from_checkpoints_without_latest(tmp_path):
    (tmp_path / "torn").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NoCheckpointError):
            read_latest(folder)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="this is no folder"):
        read_latest(tmp_path / "file")
    for name in ("step5/mp_rank_00_model_states.pt", "step6/zero/optimizer_state.pt", f"step7/{MANIFEST}"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
        with pytest.raises(CheckpointError, match="there is no file 'latest'") as caught:
            read_latest(tmp_path)
        assert not isinstance(caught.value, NoCheckpointError)
        assert name.partition("/")[0] in caught.value.fix
        with pytest.raises(CheckpointError, match="itself, not the folder it is in"):
            read_latest(tmp_path / name.partition("/")[0])


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied") as caught:
        read_latest(tmp_path)
    assert not isinstance(caught.value, NoCheckpointError)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda path, flags: denied(path))
        with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
            read_latest(tmp_path)
    monkeypatch.setattr(Path, "stat", lambda path, **options: denied(path))
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        read_latest(tmp_path)
