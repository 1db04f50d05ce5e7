"""A manifest of ds-sharded: what is right is read, what is hostile or damaged is refused with file and field."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_ckpt import manifest
from ds_ckpt.config import ShardedConfig
from ds_ckpt.formats import read
from ds_ckpt.sharded import ShardedCheckpoint
from ds_core.errors import CheckpointError
from ds_core.testing.checkpoint import snapshot

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("directory")
    (directory / "secret").write_text("outside")
    engine = ShardedCheckpoint(ShardedConfig(writers=2, chunk_bytes=64), None)
    engine.save(directory, "tag", snapshot(1, parts=2), latest=True)
    return directory / "tag"


@pytest.fixture
def original(folder):
    """The parsed manifest; what a test made of the file is undone."""
    path = folder / "checkpoint.json"
    data = path.read_bytes()
    yield json.loads(data)
    path.write_bytes(data)


def write(folder: Path, content: dict) -> None:
    """Write ``content`` as a manifest whose checksum is right: hostile, not damaged."""
    keys = ["world_size", "files", "tensors", "state", "rank_states"]
    fields = {key: value for key, value in content.items() if key in keys}
    body = (json.dumps(fields)[1:] + "\n").encode()
    (folder / "checkpoint.json").write_bytes(manifest._head(body) + body)


def test_what_was_written_is_read(folder, original):
    write(folder, original)
    stored = read(folder)
    assert (stored.format, stored.version, stored.world_size) == ("ds-sharded", "1", 1)
    assert stored.state == snapshot(1).state
    assert stored.rank_states == ({"rank": 0, "version": 1},)
    assert {tensor.of for tensor in stored.tensors.values()} == {piece.of for piece in snapshot(1).pieces}
    assert sorted(stored.files) == sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    for file in stored.files.values():
        data = (folder / file.name).read_bytes()
        assert (len(data), manifest.checksum(data)) == (file.nbytes, file.checksum)
        assert (int.from_bytes(data[:8], "little") + 8, manifest.checksum(data[: file.header[0]])) == file.header
    for tensor in stored.tensors.values():
        for chunk in tensor.chunks:
            data = (folder / chunk.file).read_bytes()[chunk.offset : chunk.offset + chunk.nbytes]
            assert manifest.checksum(data) == chunk.checksum


def test_encoding_what_was_read_gives_the_same_bytes(folder):
    stored = read(folder)
    assert manifest.encode(stored) == (folder / "checkpoint.json").read_bytes()


def test_a_flipped_bit_anywhere_in_the_manifest_is_reported(folder, original):
    path = folder / "checkpoint.json"
    data = path.read_bytes()
    for at in [*range(150), *range(150, len(data), 97), len(data) - 1]:
        for bit in (0, 5, 7):
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
            with pytest.raises(CheckpointError) as caught:
                read(folder)
            assert "checkpoint.json" in str(caught.value.where)


@pytest.mark.parametrize("damaged", [b"", b"\n", b"{}", b"null", b"[1]", b"\0" * 1000])
def test_something_else_in_its_place_is_reported(folder, original, damaged):
    (folder / "checkpoint.json").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"not JSON|not known|not a checkpoint's") as caught:
        read(folder)
    assert caught.value.where == str(folder / "checkpoint.json")


def test_a_later_version_says_what_to_upgrade(folder, original):
    path = folder / "checkpoint.json"
    path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 2', 1))
    with pytest.raises(CheckpointError, match="version 2 of its format, known is 1") as caught:
        read(folder)
    assert "upgrade ds-ckpt" in caught.value.fix


def test_the_error_names_another_checkpoint(folder, original):
    engine = ShardedCheckpoint(None, None)
    engine.save(folder.parent, "other", snapshot(2), latest=False)
    (folder / "checkpoint.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    assert "tag='other'" in caught.value.fix


def first_file(content: dict) -> str:
    return next(iter(content["files"]))


def rename(content: dict, name: str) -> None:
    content["files"] = {name if old == first_file(content) else old: row for old, row in content["files"].items()}


def set_chunk(content: dict, column: int, value) -> None:
    content["tensors"][0]["chunks"][0][column] = value


HOSTILE = {
    "an absolute path": lambda c: rename(c, "/etc/passwd"),
    "a path through ..": lambda c: rename(c, "../secret"),
    "a folder": lambda c: rename(c, "sub/file"),
    "the manifest itself": lambda c: rename(c, "checkpoint.json"),
    "a missing file": lambda c: rename(c, "nowhere.safetensors"),
    "an empty name": lambda c: rename(c, ""),
    "a size too small": lambda c: c["files"][first_file(c)].update(bytes=10),
    "a size too large": lambda c: c["files"][first_file(c)].update(bytes=10**15),
    "a negative size": lambda c: c["files"][first_file(c)].update(bytes=-1),
    "a header larger than the file": lambda c: c["files"][first_file(c)].update(header=[10**7, "xxh3:" + "0" * 32]),
    "no checksum": lambda c: c["files"][first_file(c)].update(checksum=None),
    "another checksum": lambda c: c["files"][first_file(c)].update(checksum="crc32:00000000"),
    "a shape of 10^12 elements": lambda c: c["tensors"][0].update(shape=[10**6, 10**6]),
    "a shape of 10^40 elements": lambda c: c["tensors"][0].update(shape=[10**10] * 4),
    "a shape of 1000 dimensions": lambda c: c["tensors"][0].update(shape=[1] * 1000),
    "a huge tensor without chunks": lambda c: c["tensors"][0].update(shape=[10**12], chunks=[]),
    "a huge tensor of one chunk": lambda c: c["tensors"][0].update(
        shape=[10**12], chunks=[[0, 0, 8 * 10**12, "xxh3:" + "0" * 32, None, None, 0, 10**12]]
    ),
    "a dtype that is none": lambda c: c["tensors"][0].update(dtype="complex64"),
    "another dtype": lambda c: c["tensors"][0].update(dtype="float16"),
    "a rank there is not": lambda c: c["tensors"][0].update(rank=1),
    "a tensor twice": lambda c: c["tensors"].append(c["tensors"][0]),
    "a chunk less": lambda c: c["tensors"][0]["chunks"].pop(),
    "a chunk twice": lambda c: c["tensors"][0]["chunks"].append(c["tensors"][0]["chunks"][0]),
    "a chunk in place of another": lambda c: c["tensors"][0]["chunks"].__setitem__(1, c["tensors"][0]["chunks"][0]),
    "a file there is not": lambda c: set_chunk(c, 0, 7),
    "a negative file": lambda c: set_chunk(c, 0, -1),
    "an offset behind the end": lambda c: set_chunk(c, 1, 10**9),
    "a negative offset": lambda c: set_chunk(c, 1, -8),
    "a length of bytes that is another": lambda c: set_chunk(c, 2, 8),
    "a box outside": lambda c: set_chunk(c, 4, [100, 0]),
    "an interval outside": lambda c: set_chunk(c, 7, 10**6),
    "rows of another length": lambda c: c["tensors"][0]["chunks"][0].append(1),
    "a world of none": lambda c: c.update(world_size=0),
    "a world of many": lambda c: c.update(world_size=2),
    "a state that is a list": lambda c: c.update(state=[]),
    "tensors that are text": lambda c: c.update(tensors="abc"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_manifest_is_refused(folder, original, what):
    HOSTILE[what](original)
    write(folder, original)
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    assert str(folder) in caught.value.where
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("what", "field"),
    [
        ("a path through ..", "files.../secret"),
        ("a shape of 10^40 elements", "tensors[0].shape"),
        ("a dtype that is none", "tensors[0].dtype"),
        ("a negative offset", "tensors[0].chunks[0][1]"),
        ("a box outside", "tensors[0].chunks[0]"),
        ("a world of none", "world_size"),
    ],
)
def test_the_field_is_named(folder, original, what, field):
    HOSTILE[what](original)
    write(folder, original)
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    assert caught.value.what.startswith(f"{field}:")
    assert caught.value.where.endswith("checkpoint.json")


def test_a_link_is_refused_even_to_the_right_content(folder, original):
    name = first_file(original)
    moved = folder.parent / "moved"
    (folder / name).rename(moved)
    (folder / name).symlink_to(moved)
    try:
        with pytest.raises(CheckpointError, match="is a link") as caught:
            read(folder)
        assert name in caught.value.where
    finally:
        (folder / name).unlink()
        moved.rename(folder / name)


def test_deep_json_and_a_huge_manifest_are_refused(folder, original):
    for deep in (b"[" * 10**5 + b"]" * 10**5, b'{"a":' * 10**5 + b"1" + b"}" * 10**5):
        body = b'"state": ' + deep + b"}\n"
        (folder / "checkpoint.json").write_bytes(manifest._head(body) + body)
        with pytest.raises(CheckpointError, match="nested too deeply"):
            read(folder)
    with (folder / "checkpoint.json").open("r+b") as file:
        file.truncate(2**35)
    with pytest.raises(CheckpointError, match="at most"):
        read(folder)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**12, -1, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def ways(value, way=()):
    """Yield the way to every value in parsed JSON."""
    if way:
        yield way
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from ways(item, (*way, key))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(folder, original, data):
    content = copy.deepcopy(original)
    way = data.draw(st.sampled_from(list(ways(content))))
    at = content
    for step in way[:-1]:
        at = at[step]
    if isinstance(at, dict) and data.draw(st.booleans()):
        del at[way[-1]]
    else:
        at[way[-1]] = data.draw(JSON)
    write(folder, content)
    try:
        stored = read(folder)
    except CheckpointError as error:
        message = str(error)
        assert len(message) < 2000
        return
    # What is believed fits the files.
    for tensor in stored.tensors.values():
        assert sum(chunk.chunk.length for chunk in tensor.chunks) == tensor.of.numel
        assert all(c.offset >= 0 and c.offset + c.nbytes <= stored.files[c.file].nbytes for c in tensor.chunks)
    for file in stored.files.values():
        assert (folder / file.name).stat().st_size == file.nbytes


def test_it_is_read_without_torch(folder):
    code = (
        "import sys; from pathlib import Path; from ds_ckpt.formats import read; "
        f"assert len(read(Path({str(folder)!r})).tensors) > 20; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
