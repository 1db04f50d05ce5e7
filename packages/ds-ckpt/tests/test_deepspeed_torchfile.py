"""Files of torch.save, in both of its forms: every storage's place is found, and damage is refused."""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_ckpt.formats.deepspeed import read_deepspeed
from ds_ckpt.formats.deepspeed.torchfile import read_torch_file
from ds_ckpt.formats.deepspeed.values import TensorRef
from ds_core.errors import CheckpointError

FIXTURES = Path(__file__).parent / "deepspeed-0.19.6"
FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(value: Any, path: Path, zipped: bool = True) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)


def tensor_of(ref: Any, folder: Path) -> torch.Tensor:
    assert type(ref) is TensorRef
    dtype: torch.dtype = getattr(torch, ref.dtype)
    data = (folder / ref.file).read_bytes()[ref.start_byte : ref.start_byte + ref.span_nbytes]
    if not data:
        return torch.empty(ref.shape, dtype=dtype)
    return torch.as_strided(torch.frombuffer(bytearray(data), dtype=dtype), ref.shape, ref.strides)


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_are_found(dtype: torch.dtype, zipped: bool, tmp_path: Path) -> None:
    value = torch.arange(-3, 9).view(3, 4).to(dtype)
    save({"first": torch.ones(7), "value": value, "empty": value[:0], "scalar": value[0, 0]}, tmp_path / "x.pt", zipped)
    file = read_torch_file(tmp_path, "x.pt")
    assert (file.name, file.nbytes) == ("x.pt", (tmp_path / "x.pt").stat().st_size)
    found = {key: tensor_of(ref, tmp_path) for key, ref in file.value.items()}
    assert torch.equal(found["value"], value)
    assert found["value"].dtype == dtype
    assert found["empty"].shape == (0, 4)
    assert torch.equal(found["scalar"], value[0, 0])
    assert torch.equal(found["first"], torch.ones(7))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32], ids=str)
def test_dtypes_without_a_storage_class_are_found(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.arange(0, 12).float().to(dtype) if dtype.is_floating_point else torch.arange(12).to(dtype)
    save({"value": value[3:]}, tmp_path / "x.pt")
    found = tensor_of(read_torch_file(tmp_path, "x.pt").value["value"], tmp_path)
    assert torch.equal(found.view(torch.uint8), value[3:].view(torch.uint8))


@FORMS
def test_views_share_their_storage(zipped: bool, tmp_path: Path) -> None:
    flat = torch.arange(24.0)
    value = {
        "a": flat[:6].view(2, 3),
        "b": flat[6:18].view(3, 4).t(),
        "c": flat[::5],
        "p": torch.nn.Parameter(flat[2:]),
    }
    save(value, tmp_path / "x.pt", zipped)
    found = read_torch_file(tmp_path, "x.pt").value
    assert len({id(ref.storage) for ref in found.values()}) == 1
    for key, expected in value.items():
        assert torch.equal(tensor_of(found[key], tmp_path), expected)
    assert (found["a"].is_row_by_row, found["b"].is_row_by_row, found["c"].is_row_by_row) == (True, False, False)


@FORMS
def test_other_values_are_plain(zipped: bool, tmp_path: Path) -> None:
    value = {"sizes": OrderedDict(a=torch.Size([2, 3])), "device": torch.device("cuda", 1), "best": np.float64(0.5)}
    value["names"] = {"x"}
    save(value, tmp_path / "x.pt", zipped)
    found = read_torch_file(tmp_path, "x.pt").value
    assert found == {"sizes": {"a": (2, 3)}, "device": "cuda:1", "best": 0.5, "names": {"x"}}


def test_tensors_with_attributes_are_found(tmp_path: Path) -> None:
    value = torch.arange(5.0)
    value.ds_id = "0_6"  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.ds_id = 1  # type: ignore[attr-defined]
    save({"value": value, "parameter": parameter}, tmp_path / "x.pt")
    found = read_torch_file(tmp_path, "x.pt").value
    assert torch.equal(tensor_of(found["value"], tmp_path), torch.arange(5.0))
    assert torch.equal(tensor_of(found["parameter"], tmp_path), torch.arange(3.0))


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_torch_file(path.parent, path.name)
    assert caught.value.fix


@FORMS
def test_every_truncation_is_refused(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save({"value": torch.arange(40.0)}, path, zipped)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        refused(path, "refused|no whole file")


def test_a_link_is_refused(tmp_path: Path) -> None:
    save({}, tmp_path / "real.pt")
    (tmp_path / "x.pt").symlink_to(tmp_path / "real.pt")
    refused(tmp_path / "x.pt", "link")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"")
    refused(path, "it is empty")
    path.write_bytes(b"\x1f\x8b" * 100)
    refused(path, "it begins with")
    (tmp_path / "folder.pt").mkdir()
    refused(tmp_path / "folder.pt", "no regular file")


def rewritten(path: Path, edit: Any, **options: Any) -> None:
    """Write the archive anew, its entries changed by ``edit(name, content) -> content or None``."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in entries:
            changed = edit(name, content)
            if changed is not None:
                archive.writestr(name, changed)
    path.write_bytes(buffer.getvalue())


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    save({"value": torch.arange(40.0), "other": torch.arange(3)}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def test_an_archive_written_anew_is_read(archive: Path) -> None:
    rewritten(archive, lambda name, content: content)
    found = read_torch_file(archive.parent, archive.name).value
    assert torch.equal(tensor_of(found["value"], archive.parent), torch.arange(40.0))


def test_a_compressed_archive_is_refused(archive: Path) -> None:
    rewritten(archive, lambda name, content: content, compression=zipfile.ZIP_DEFLATED)
    refused(archive, "compressed")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda name, content: content[:-4] if name.endswith("data/0") else content, "156 bytes instead of 160"),
        (lambda name, content: content + b"0000" if name.endswith("data/0") else content, "164 bytes instead of 160"),
        (lambda name, content: None if name.endswith("data/1") else content, "storage 1 is not in the archive"),
        (lambda name, content: None if name.endswith("data.pkl") else content, r"no x/data\.pkl"),
        (lambda name, content: b"big" if name.endswith("byteorder") else content, "byte order b'big'"),
        (lambda name, content: b"x" * 5000 if name.endswith("byteorder") else content, "5000 bytes"),
    ],
)
def test_a_wrong_archive_is_refused(archive: Path, change: Any, match: str) -> None:
    rewritten(archive, change)
    refused(archive, match)


def with_entry(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x")


@pytest.mark.parametrize("name", ["x/../../data/2", "/etc/passwd", "y/data/2", "x", "../x/data/0"])
def test_entries_out_of_place_are_refused(archive: Path, name: str) -> None:
    with_entry(archive, name)
    refused(archive, "out of place|another name|twice")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(archive: Path) -> None:
    with_entry(archive, "x/data/0")
    refused(archive, "twice")


def test_entries_that_overlap_are_refused(archive: Path) -> None:
    # The last entry of the directory is given the place of the first: two names for the same bytes.
    data = bytearray(archive.read_bytes())
    last = data.rindex(b"PK\x01\x02")
    data[last + 42 : last + 46] = struct.pack("<I", 0)
    archive.write_bytes(data)
    refused(archive, "another name|overlaps")


def test_an_entry_inside_another_is_refused(archive: Path) -> None:
    """The last entry's header is in the content of the one before."""
    header = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 4, 4, 8, 0) + b"x/data/9"
    with zipfile.ZipFile(archive, "a") as entries:
        entries.writestr("x/data/8", header + b"1234" * 4)
        entries.writestr("x/data/9", b"1234")
    data = bytearray(archive.read_bytes())
    at = data.index(header[:30] + b"x/data/9")
    directory = data.rindex(b"PK\x01\x02")
    data[directory + 42 : directory + 46] = struct.pack("<I", at)
    archive.write_bytes(data)
    refused(archive, "entry 'data/9' overlaps")


@pytest.mark.parametrize("field", [20, 24, 42], ids=["compressed size", "size", "offset"])
@pytest.mark.parametrize("value", [2**31, 2**32 - 2, 1])
def test_false_numbers_in_the_directory_are_refused(archive: Path, field: int, value: int) -> None:
    data = bytearray(archive.read_bytes())
    first = data.index(b"PK\x01\x02")
    data[first + field : first + field + 4] = struct.pack("<I", value)
    archive.write_bytes(data)
    refused(archive, "no whole file|refused")


def test_the_older_form_must_be_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save({"value": torch.arange(40.0)}, path, zipped=False)
    whole = path.read_bytes()
    magic = whole.index(b"\x8a\x0al\xfc")
    path.write_bytes(whole[: magic + 2] + b"\0" + whole[magic + 3 :])
    refused(path, "first numbers")
    path.write_bytes(whole.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))
    refused(path, "little-endian")
    at = len(whole) - 160 - 8
    path.write_bytes(whole[:at] + struct.pack("<q", 41) + whole[at + 8 :])
    refused(path, "41 elements instead of 40")


NAMES = sorted(FIXTURES.glob("plain-stage2-world2-fp32/*/*.pt"))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(NAMES), st.data())
def test_mutated_checkpoints_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, target: Path, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    for path in NAMES:
        content = bytearray(path.read_bytes())
        if path == target:
            for _ in range(data.draw(st.integers(1, 4))):
                at = data.draw(st.integers(0, len(content) - 1))
                content[at] = data.draw(st.integers(0, 255))
        (folder / path.name).write_bytes(content)
    with contextlib.suppress(CheckpointError):
        stored = read_deepspeed(folder)
        for tensor in stored.tensors.values():
            for chunk in tensor.chunks:
                assert 0 <= chunk.offset <= chunk.offset + chunk.nbytes <= stored.files[chunk.file].nbytes
