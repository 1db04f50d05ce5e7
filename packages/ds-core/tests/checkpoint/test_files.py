"""Files that are whole or absent: whatever fails, whenever the process dies; and safetensors that others can read."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import stat
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

from ds_core.checkpoint import safetensors_format
from ds_core.checkpoint.atomic import NotDurableError, make_durable, replace_text, sync_folder
from ds_core.checkpoint.files import write_safetensors
from ds_core.checkpoint.safetensors_format import ITEM_BYTES, WORDS
from ds_core.checkpoint.saving import together
from ds_core.errors import CheckpointError


def header_of(path: Path) -> tuple[int, dict]:
    """Return where the tensors start, and the header."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return 8 + size, json.loads(data[8 : 8 + size])


# -- the format -------------------------------------------------------------------------------------------------------

STORED = [getattr(torch, word) for word in WORDS]
DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in STORED]


def of_dtype(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return small whole numbers, which every dtype holds."""
    values = torch.arange(max(1, torch.Size(shape).numel())) % 7
    return values[: torch.Size(shape).numel()].to(dtype).reshape(shape)


def test_sizes_are_those_of_torch():
    assert {word: getattr(torch, word).itemsize for word in ITEM_BYTES} == ITEM_BYTES
    assert WORDS.keys() <= ITEM_BYTES.keys()


@pytest.mark.parametrize("dtype", STORED, ids=DTYPE_IDS)
def test_every_dtype_and_shape_is_read_back_by_safetensors_itself(dtype, tmp_path):
    tensors = {
        "matrix": of_dtype(dtype, 5, 3),
        "scalar": of_dtype(dtype),
        "empty": of_dtype(dtype, 0, 4),
        "one": of_dtype(dtype, 1),
        "transposed": of_dtype(dtype, 4, 6).t(),
        "strided": of_dtype(dtype, 8, 6)[::2, 1::2],
        "expanded": of_dtype(dtype, 3, 1).expand(3, 5),
        "offset": of_dtype(dtype, 30)[7:20],
    }
    path = tmp_path / "file.safetensors"
    size = write_safetensors(path, list(tensors.items()), {"note": "text \u00e9"})
    assert path.stat().st_size == size
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*as_bytes), name
    assert header_of(path)[1]["__metadata__"] == {"note": "text \u00e9"}


def test_special_values_keep_their_bits(tmp_path):
    values = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    write_safetensors(tmp_path / "x", [("values", values)], {})
    assert torch.equal(load_file(tmp_path / "x")["values"].view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("length", range(1, 18))
def test_tensors_start_at_a_multiple_of_their_item_size(length, tmp_path):
    tensors = [
        ("d" * length, torch.zeros(3, dtype=torch.float64)),
        ("f", torch.zeros(5)),
        ("h", torch.zeros(3, dtype=torch.bfloat16)),
        ("b", torch.zeros(7, dtype=torch.bool)),
    ]
    write_safetensors(tmp_path / "x", tensors, {})
    start, header = header_of(tmp_path / "x")
    assert start % 8 == 0
    for name, tensor in tensors:
        assert (start + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_a_parameter_and_no_tensors_at_all(tmp_path):
    write_safetensors(tmp_path / "x", [("w", torch.nn.Parameter(torch.ones(2)))], {})
    assert torch.equal(load_file(tmp_path / "x")["w"], torch.ones(2))
    write_safetensors(tmp_path / "x", [], {})
    assert load_file(tmp_path / "x") == {}


def test_a_dtype_the_format_does_not_have_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        write_safetensors(tmp_path / "x", [("w", torch.ones(2)), ("freqs", torch.ones(2, dtype=torch.complex64))], {})
    assert "dtype torch.complex64 cannot be stored" in str(caught.value)
    assert "freqs" in str(caught.value.where)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["w", "__metadata__"])
def test_a_name_given_twice_is_refused(name, tmp_path):
    # The header could describe only one of them, and the other's bytes would shift everything behind.
    with pytest.raises(CheckpointError, match=name):
        write_safetensors(tmp_path / "x", [("w", torch.ones(2)), (name, torch.zeros(2))], {})
    assert list(tmp_path.iterdir()) == []


# -- failures ---------------------------------------------------------------------------------------------------------


def disk_full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(io.FileIO):
    """The disk has 100 bytes left."""

    def write(self, data) -> int:
        if self.tell() + len(data) > 100:
            disk_full()
        return super().write(data)


def open_on_a_full_disk(path: Path, mode: str, **_: object) -> io.BufferedWriter:
    return io.BufferedWriter(FullDisk(path, mode))


def write_old(folder: Path, kind: str) -> None:
    if kind == "text":
        replace_text(folder / "file", "old")
    else:
        write_safetensors(folder / "file", [("w", torch.zeros(3))], {})


def write_new(folder: Path, kind: str, numel: int) -> None:
    if kind == "text":
        replace_text(folder / "file", "n" * numel)
    else:
        write_safetensors(folder / "file", [("w", torch.ones(numel))], {})


KINDS = pytest.mark.parametrize("kind", ["text", "tensors"])


@KINDS
# 300 stay in the writer's buffer until it is flushed, and are tried again when it is closed; 30000 go straight on.
@pytest.mark.parametrize("numel", [300, 30000])
def test_a_full_disk_leaves_the_old_content_and_nothing_beside(kind, numel, tmp_path, monkeypatch):
    write_old(tmp_path, kind)
    before = (tmp_path / "file").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_a_full_disk)
        with pytest.raises(OSError, match="No space left"):
            write_new(tmp_path, kind, numel)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == before


def test_a_full_disk_when_the_last_bytes_are_flushed_by_close(tmp_path, monkeypatch):
    # The first tensor fails while the header is still in the buffer; closing the file tries the header again.
    write_old(tmp_path, "tensors")
    monkeypatch.setattr(Path, "open", open_on_a_full_disk)
    many = [(f"a rather long name {i}", torch.ones(200)) for i in range(20)]
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(tmp_path / "file", many, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@KINDS
@pytest.mark.parametrize("error", [OSError(errno.EIO, "bad disk"), KeyboardInterrupt()], ids=["EIO", "interrupted"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_sync_or_rename_that_fails_leaves_the_old_content(kind, error, call, tmp_path, monkeypatch):
    write_old(tmp_path, kind)
    before = (tmp_path / "file").read_bytes()

    def fails(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fails)
        with pytest.raises(type(error)):
            write_new(tmp_path, kind, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == before


def test_a_tensor_that_cannot_be_copied_leaves_nothing(tmp_path):
    with pytest.raises(NotImplementedError):
        write_safetensors(tmp_path / "x", [("a", torch.ones(3)), ("b", torch.ones(3, device="meta"))], {})
    assert list(tmp_path.iterdir()) == []


@KINDS
def test_a_folder_that_cannot_be_synced_is_told_as_what_it_is(kind, tmp_path, monkeypatch):
    write_old(tmp_path, kind)
    before = (tmp_path / "file").read_bytes()
    fsync = os.fsync

    def fails_for_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_for_folders)
    with pytest.raises(NotDurableError, match="Input/output error") as caught:
        write_new(tmp_path, kind, 10)
    assert caught.value.filename == str(tmp_path)
    assert (tmp_path / "file").read_bytes() != before, "it is in place"
    with pytest.raises(CheckpointError, match="in place, but a power failure may undo it: Input/output error") as told:
        together(lambda: write_new(tmp_path, kind, 12), tmp_path, None)
    assert told.value.fix == "check the disk and save again"


def test_a_file_that_cannot_be_removed_does_not_hide_what_went_wrong(tmp_path, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "fsync", disk_full)
    monkeypatch.setattr(Path, "unlink", fails)
    with pytest.raises(OSError, match="No space left"):
        replace_text(tmp_path / "file", "new")


def test_a_header_that_readers_refuse_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_format, "MAX_HEADER_BYTES", 200)
    write_safetensors(tmp_path / "a", [("w" * 20, torch.ones(2))], {})
    with pytest.raises(CheckpointError, match="need a header of"):
        write_safetensors(tmp_path / "b", [("w" * 200, torch.ones(2))], {})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# -- SIGKILL ----------------------------------------------------------------------------------------------------------


class CountedFile(io.FileIO):
    """A raw file, so that every write of the buffer above it can be seen."""


def die_at(point: int, after: bool) -> None:
    """Kill this process before or after its ``point``-th call of open, write, fsync or rename."""
    seen = 0

    def counted(call):
        def instead(*args, **kwargs):
            nonlocal seen
            seen += 1
            mine = seen - 1 == point
            if mine and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return instead

    CountedFile.write = counted(io.FileIO.write)
    Path.open = counted(lambda path, mode, **_: io.BufferedWriter(CountedFile(path, mode)))
    Path.replace = counted(Path.replace)
    os.fsync = counted(os.fsync)


def in_a_fork(work) -> int:
    """Run ``work`` in a fork; return the signal that ended it, or 0."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code <= 0, "the work raised"
    return -code


@KINDS
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_call_the_file_is_the_old_or_the_new_one_whole(kind, after, tmp_path):
    write_new(tmp_path, kind, 20000)
    new = (tmp_path / "file").read_bytes()
    (tmp_path / "file").unlink()
    for exists in (True, False):
        for point in range(30):
            folder = tmp_path / f"{exists}{point}"
            folder.mkdir()
            if exists:
                write_old(folder, kind)
            old = (folder / "file").read_bytes() if exists else None

            def work(point=point, folder=folder):
                die_at(point, after)
                write_new(folder, kind, 20000)

            killed = in_a_fork(work)
            found = (folder / "file").read_bytes() if (folder / "file").exists() else None
            assert found in (old, new), f"killed {'after' if after else 'before'} call {point}"
            if not killed:
                assert found == new
                assert point >= 4, "open, write, fsync, rename: it was killed at too few points to mean anything"
                break
        else:
            raise AssertionError("a write of more than 30 calls")


# -- order of durability ----------------------------------------------------------------------------------------------


def test_the_content_is_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))  # noqa: PTH115, PTH119
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        calls.append(f"rename {path.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    replace_text(tmp_path / "latest", "tag")
    assert calls == ["sync latest.tmp", "rename latest.tmp", f"sync {tmp_path.name}"]
    calls.clear()
    write_safetensors(tmp_path / "x", [("w", torch.ones(2))], {})
    assert calls == ["sync x.tmp", "rename x.tmp", f"sync {tmp_path.name}"]


def test_every_folder_that_is_made_is_synced(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    make_durable(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    synced.clear()
    make_durable(tmp_path / "a" / "b")
    assert synced == []
    make_durable(tmp_path / "a" / "d")
    assert synced == [str(tmp_path / "a")]
    monkeypatch.chdir(tmp_path)
    synced.clear()
    make_durable(Path("e/f"))
    assert synced == [str(tmp_path), str(tmp_path / "e")]
    (tmp_path / "file").write_text("")
    for place in ("file", "file/folder"):
        with pytest.raises((FileExistsError, NotADirectoryError)):
            make_durable(tmp_path / place)


def test_a_file_left_by_a_crash_is_overwritten(tmp_path):
    (tmp_path / "latest.tmp").write_text("a torn write that was longer than the next one")
    replace_text(tmp_path / "latest", "tag")
    assert (tmp_path / "latest").read_text() == "tag"
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_syncing_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "nowhere")


def test_numpy_reads_the_bytes_as_they_are(tmp_path):
    values = torch.arange(12, dtype=torch.int32).view(3, 4)
    write_safetensors(tmp_path / "x", [("v", values.t())], {})
    start, header = header_of(tmp_path / "x")
    assert header["v"] == {"dtype": "I32", "shape": [4, 3], "data_offsets": [0, 48]}
    data = numpy.frombuffer((tmp_path / "x").read_bytes()[start:], dtype="<i4").reshape(4, 3)
    assert numpy.array_equal(data, values.numpy().T)
