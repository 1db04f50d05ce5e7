"""ds-plain through the one description: what the core wrote is read, what is hostile or damaged is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_ckpt.formats import read
from ds_ckpt.sharded import ShardedCheckpoint
from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.errors import CheckpointError
from ds_core.testing.checkpoint import check_content, snapshot

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path) -> Path:
    PlainCheckpoint(None, None).save(tmp_path, "tag", snapshot(1, parts=3), latest=True)
    return tmp_path / "tag"


def the_file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def change_header(folder: Path, change) -> None:
    """Change the header of the only file, and the manifest's size of it."""
    path = the_file(folder)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    change_manifest(folder, lambda m: m["files"].update({path.name: path.stat().st_size}))


def change_manifest(folder: Path, change) -> None:
    path = folder / "checkpoint.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_rows(folder: Path, change) -> None:
    def of_header(header):
        rows = json.loads(header["__metadata__"]["pieces"])
        change(rows)
        header["__metadata__"]["pieces"] = json.dumps(rows)

    change_header(folder, of_header)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_the_engine_of_this_package_reads_what_plain_wrote(folder, parts):
    check_content(ShardedCheckpoint(None, None), folder.parent, "tag", 1, parts=parts)


def test_what_it_says(folder):
    stored = read(folder)
    assert (stored.format, stored.version, stored.world_size) == ("ds-plain", "1", 1)
    assert stored.state == snapshot(1).state
    assert {tensor.of for tensor in stored.tensors.values()} == {piece.of for piece in snapshot(1).pieces}
    assert all(file.checksum is None for file in stored.files.values())


def test_it_is_read_without_torch(folder):
    code = (
        "import sys; from pathlib import Path; from ds_ckpt.formats import read; "
        f"assert len(read(Path({str(folder)!r})).tensors) > 20; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(world_size=2),
        lambda m: m.update(world_size="1"),
        lambda m: m.update(files={"/etc/passwd": 10}),
        lambda m: m.update(files={"../latest": 3}),
        lambda m: m.update(files={}),
        lambda m: m.update(files=[]),
        lambda m: m.update(state=None),
        lambda m: m.update(version="1"),
        lambda m: m.update(version=0),
        lambda m: m.update(format="ds-sharded"),
        lambda m: m.pop("state"),
    ],
)
def test_a_hostile_manifest_is_refused(folder, change):
    change_manifest(folder, change)
    with pytest.raises(CheckpointError):
        read(folder)


def test_a_later_version_says_what_to_upgrade(folder):
    change_manifest(folder, lambda m: m.update(version=2))
    with pytest.raises(CheckpointError, match="version 2") as caught:
        read(folder)
    assert "upgrade" in caught.value.fix


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.pop(0),
        lambda rows: rows.append(rows[0]),
        lambda rows: rows[0].update(shape=[10**6, 10**6]),
        lambda rows: rows[0].update(dtype="float16"),
        lambda rows: rows[0].update(key="nothing"),
        lambda rows: rows[0].update(key=rows[5]["key"]),
        lambda rows: rows[0].update(interval=[0, 10**6]),
        lambda rows: rows[0].update(box=[[0, 0], [10**5, 5]]),
        lambda rows: rows[0].update(rank=5),
        lambda rows: rows[0].pop("name"),
        lambda rows: rows.insert(0, None),
    ],
)
def test_a_hostile_table_is_refused(folder, change):
    change_rows(folder, change)
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    assert str(folder) in caught.value.where


def test_offsets_behind_the_end_and_shared_bytes_are_refused(folder):
    names: list[str] = []

    def far(header):
        names.extend(key for key in header if key != "__metadata__")
        begin, end = header[names[0]]["data_offsets"]
        header[names[0]]["data_offsets"] = [begin + 10**9, end + 10**9]

    change_header(folder, far)
    with pytest.raises(CheckpointError, match="behind the end"):
        read(folder)

    def shared(header):
        same = [key for key in names[1:] if header[key]["shape"] == header[names[1]]["shape"]]
        header[names[0]]["data_offsets"] = header[same[0]]["data_offsets"]

    change_header(folder, shared)
    with pytest.raises(CheckpointError):
        read(folder)


@pytest.mark.parametrize("head", [(2**62).to_bytes(8, "little"), b"\xff" * 8, b"", b"\x05", bytes(8)])
def test_a_header_that_is_none_is_refused(folder, head):
    path = the_file(folder)
    path.write_bytes(head + b"x" * 50 if len(head) == 8 else head)
    change_manifest(folder, lambda m: m["files"].update({path.name: path.stat().st_size}))
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    assert path.name in caught.value.where


def test_missing_cut_and_linked_files_are_named(folder):
    path = the_file(folder)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"{len(data) - 1} bytes instead of {len(data)}"):
        read(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing") as caught:
        read(folder)
    assert path.name in caught.value.where
    (folder.parent / "moved").write_bytes(data)
    path.symlink_to(folder.parent / "moved")
    with pytest.raises(CheckpointError, match="link"):
        read(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bytes_in_the_header_are_read_or_refused(folder, data):
    path = the_file(folder)
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    at = data.draw(st.integers(0, size - 1))
    put = data.draw(st.binary(min_size=1, max_size=8))
    path.write_bytes((whole[:at] + put + whole[at + len(put) :])[: len(whole)])
    try:
        stored = read(folder)
    except CheckpointError as error:
        message = str(error)
        assert len(message) < 2000
    else:
        for tensor in stored.tensors.values():
            assert all(c.offset + c.nbytes <= len(whole) for c in tensor.chunks)
    finally:
        path.write_bytes(whole)


def test_sizes_of_elements_are_torchs():
    from ds_ckpt.checks import ITEM_BYTES

    assert {name: getattr(torch, name).itemsize for name in ITEM_BYTES} == ITEM_BYTES
