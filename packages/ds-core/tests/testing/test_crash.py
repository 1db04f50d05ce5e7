"""The helper that kills saves sees every way of changing a file, and kills where it was told to."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from ds_core.testing import crash

if TYPE_CHECKING:
    from pathlib import Path

WAYS = {
    "os.open": (lambda p: os.close(os.open(p / "new", os.O_CREAT | os.O_WRONLY)), ["create"]),
    "write_bytes": (lambda p: (p / "new").write_bytes(b"x"), ["create", "write"]),
    "write_text": (lambda p: (p / "new").write_text("x\ny", encoding="utf-8"), ["create", "write"]),
    "open": (lambda p: print("x", file=open(p / "new", "w")), ["create", "write"]),  # noqa: PTH123, SIM115
    "append": (lambda p: (p / "there").open("ab", buffering=0).write(b"x"), ["create", "write"]),
    "fdopen": (lambda p: os.fdopen(os.open(p / "new", os.O_CREAT | os.O_RDWR), "r+b").write(b"x"), ["create", "write"]),
    "replace": (lambda p: (p / "there").replace(p / "new"), ["rename"]),
    "rename": (lambda p: os.rename(p / "there", p / "new"), ["rename"]),  # noqa: PTH104
    "unlink": (lambda p: (p / "there").unlink(), ["remove"]),
    "remove": (lambda p: os.remove(p / "there"), ["remove"]),  # noqa: PTH107
    "mkdir": (lambda p: (p / "new" / "deep").mkdir(parents=True), ["mkdir", "mkdir", "mkdir"]),
    "rmdir": (lambda p: (p / "folder").rmdir(), ["rmdir"]),
    "link": (lambda p: os.link(p / "there", p / "new"), ["link"]),
    "symlink": (lambda p: (p / "new").symlink_to("there"), ["link"]),
    "truncate": (lambda p: os.truncate(p / "there", 1), ["truncate"]),
    "read": (lambda p: (p / "there").read_bytes() + b"".join(map(os.fsencode, os.listdir(p))), []),  # noqa: PTH208
}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "there").write_text("there")
    return tmp_path


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_seen_in_any_thread(way, folder):
    work, expected = WAYS[way]
    seen: list[str] = []
    with crash.watched(lambda operation: seen.append(operation.name)):
        thread = threading.Thread(target=work, args=(folder,))
        thread.start()
        thread.join()
    assert seen == expected
    with crash.watched(lambda operation: seen.append(operation.name)):
        sync(folder)
    assert seen == [*expected, "sync"]
    (folder / "unseen").write_text("x")
    assert seen == [*expected, "sync"], "it still watches"


def test_what_is_raised_ahead_of_it_is_what_the_caller_gets(folder):
    def full(operation: crash.Operation) -> None:
        if operation.name == "write":
            assert operation.path == str(folder / "new")
            assert operation.data == b"content"
            raise OSError(28, "full")

    with crash.watched(full), pytest.raises(OSError, match="full"):
        (folder / "new").write_bytes(b"content")
    assert (folder / "new").read_bytes() == b""
    assert (folder / "new").write_bytes(b"content") == 7


def test_two_may_watch_at_the_same_time(folder):
    one, other = [], []
    with crash.watched(one.append):
        with crash.watched(other.append):
            (folder / "new").write_bytes(b"x")
        (folder / "new").write_bytes(b"y")
    assert [operation.name for operation in one] == ["create", "write"] * 2
    assert [operation.name for operation in other] == ["create", "write"]


def three_writes(folder: Path, **when) -> None:
    crash.die_at(note=folder / "note", **when)
    for name in ("a", "b", "c"):
        with (folder / name).open("wb") as file:
            file.write(b"0123456789")


@pytest.mark.parametrize(
    ("when", "left", "operation"),
    [
        ({"point": 0}, {}, "create"),
        ({"point": 1}, {"a": 0}, "write"),
        ({"point": 2}, {"a": 5}, "half a write"),
        ({"point": 3}, {"a": 10}, "create"),
        ({"point": 1, "only": ["create"]}, {"a": 10}, "create"),
        ({"nbytes": 13}, {"a": 10, "b": 3}, "write"),
        ({"nbytes": 0}, {"a": 0}, "write"),
    ],
)
def test_a_process_is_killed_where_it_was_told_to(when, left, operation, tmp_path):
    assert crash.ends_of([crash.fork(three_writes, tmp_path, **when)]) == [-signal.SIGKILL]
    assert {p.name: p.stat().st_size for p in tmp_path.iterdir() if p.name != "note"} == left
    assert (tmp_path / "note").read_text() == operation


def test_a_process_that_is_not_killed_ends(tmp_path):
    assert crash.ends_of([crash.fork(three_writes, tmp_path, point=9), crash.fork(three_writes, tmp_path / "no")]) == [
        0,
        1,
    ]


def test_what_does_not_end_is_killed():
    ends = threading.Event()
    pid = crash.fork(ends.wait)
    with pytest.raises(AssertionError, match="did not end"):
        crash.ends_of([pid], timeout_s=0.0)
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, 0)


def test_a_file_may_not_grow_beyond_a_limit(tmp_path):
    with crash.limited_file_size(100), pytest.raises(OSError, match="too large"):
        (tmp_path / "file").write_bytes(bytes(200))
    (tmp_path / "file").write_bytes(bytes(200))
