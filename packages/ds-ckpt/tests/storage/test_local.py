"""A folder of this machine: what is opened, listed, written and removed in it."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from pathlib import Path

import pytest

from ds_ckpt.storage import folder_at
from ds_ckpt.storage.local import open_inside
from ds_core.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "tag"
    (inside / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for path in (tmp_path / "secret", tmp_path / "outside" / "secret", inside / "sub" / "file", inside / "file"):
        path.write_text("content")
    (inside / "link").symlink_to("file")
    (inside / "link_out").symlink_to("../secret")
    (inside / "folder_out").symlink_to("../outside")
    (inside / "gone").symlink_to("nowhere")
    os.mkfifo(inside / "pipe")
    return inside


@pytest.mark.parametrize("name", ["file", "sub/file"])
def test_a_file_inside_is_read(folder, name):
    assert folder_at(folder).read(name, 100) == b"content"


def test_the_folder_itself_may_be_a_link(folder):
    (folder.parent / "alias").symlink_to("tag")
    assert folder_at(folder.parent / "alias").read("file", 100) == b"content"


HOSTILE = [
    "../secret",
    "sub/../../secret",
    "sub/../file",
    "/etc/passwd",
    "//etc/passwd",
    "",
    ".",
    "..",
    "sub/",
    "./file",
    "sub//file",
    "sub\\file",
    "file\0",
    "link",
    "link_out",
    "folder_out/secret",
    "gone",
    "pipe",
    "sub",
    "missing",
    "file/x",
    "\ud800",
    "x" * 300,
    "x/" * 3000 + "x",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leads_elsewhere_is_refused(folder, name):
    with pytest.raises(CheckpointError) as caught:
        open_inside(folder, name)
    assert str(folder) in str(caught.value.where)


def test_a_link_is_called_one(folder):
    for name in ("link", "link_out", "folder_out/secret", "gone"):
        with pytest.raises(CheckpointError, match="is a link"):
            open_inside(folder, name)


def test_nothing_outside_is_opened(folder):
    opened: list[str] = []
    watching = True

    def watch(event, args):
        if watching and event == "open":
            opened.append(str(args[0]))

    sys.addaudithook(watch)
    try:
        for name in HOSTILE:
            with pytest.raises(CheckpointError):
                open_inside(folder, name)
    finally:
        watching = False
    assert opened, "the hook sees nothing"
    # Each open is the folder, or one part of a name below a descriptor.
    assert {name for name in opened if "/" in name} <= {str(folder)}
    assert ".." not in opened


def test_no_descriptor_is_left_open(folder):
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0  # noqa: PTH208
    for name in HOSTILE * 3:
        with pytest.raises(CheckpointError):
            open_inside(folder, name)
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0  # noqa: PTH208
    assert after == before


def test_a_huge_file_is_not_read(folder):
    with (folder / "huge").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match=str(2**40)):
        folder_at(folder).read("huge", 2**20)


def test_a_file_is_what_is_no_folder(folder):
    names = ("file", "link", "link_out", "folder_out", "gone", "pipe")
    assert [name for name in names if not folder_at(folder).has(name)] == []
    assert [name for name in ("sub", "missing", "file/x") if folder_at(folder).has(name)] == []
    (folder / "itself").symlink_to("itself")
    assert folder_at(folder).folders() == ["folder_out", "sub"]
    assert "itself" in folder_at(folder).files()


def test_links_and_the_folders_they_lead_to(folder):
    place, outside = folder_at(folder), folder_at(folder.parent / "outside")
    assert [name for name in ("sub", "folder_out", "gone", "missing") if (place / name).is_link()] == [
        "folder_out",
        "gone",
    ]
    assert (place / "folder_out").identity() == outside.identity() != (place / "sub").identity()
    assert (place / "gone").identity() is (place / "missing").identity() is None


def refuse_to_read() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize(
    ("module", "name", "ask"),
    [
        (os, "preadv", lambda file: file.read_into(0, memoryview(bytearray(3)))),
        (os, "preadv", lambda file: list(file.blocks())),
        (mmap, "mmap", lambda file: file.view(0, 3)),
    ],
    ids=["read_into", "blocks", "view"],
)
def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch, module, name, ask):
    file = folder_at(folder).open("file")
    monkeypatch.setattr(module, name, lambda *args, **options: refuse_to_read())
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error") as caught:
        ask(file)
    assert caught.value.where == str(folder / "file")


def test_a_file_cut_before_it_is_mapped(folder):
    file = folder_at(folder).open("file")
    os.truncate(folder / "file", 3)
    with pytest.raises(CheckpointError, match="a file of the checkpoint cannot be read: mmap length"):
        file.view(0, 7)
