"""Reading: every chunk that is needed once, none that is not, checked, into whatever memory it is wanted in."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_ckpt import ranges
from ds_ckpt.config import ShardedConfig
from ds_ckpt.formats import read
from ds_ckpt.loading import StoredReader
from ds_ckpt.sharded import ShardedCheckpoint
from ds_ckpt.storage import folder_at
from ds_ckpt.stored import Stored, StoredChunk, StoredFile, StoredTensor
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Box, Chunk, LogicalTensor, Piece, Snapshot

SHAPE = (12, 10)
OF = LogicalTensor("layer.w", "master", SHAPE, "float32")
VALUES = torch.arange(120.0).view(SHAPE)


def save(directory: Path, *chunks: Chunk, chunk_bytes: int = 10**6) -> Path:
    pieces = [Piece(OF, chunk, cut(chunk)) for chunk in chunks or [Chunk.whole(SHAPE)]]
    engine = ShardedCheckpoint(ShardedConfig(writers=2, chunk_bytes=chunk_bytes), None)
    engine.save(directory, "tag", Snapshot(pieces, {}, {}), latest=False)
    return directory / "tag"


def cut(chunk: Chunk) -> torch.Tensor:
    box = VALUES[tuple(slice(s, s + n) for s, n in zip(chunk.box.start, chunk.box.size, strict=True))]
    return box.reshape(-1)[chunk.offset : chunk.offset + chunk.length].clone()


class Counted:
    """Counts the bytes that are read, and those that are checked."""

    def __init__(self, monkeypatch) -> None:
        self.read = self.checked = 0
        preadv, checksum = os.preadv, ranges.checksum

        def counted_read(descriptor, buffers, offset):
            found = preadv(descriptor, buffers, offset)
            self.read += found
            return found

        def counted_sum(data):
            self.checked += len(data)
            return checksum(data)

        class CountedChecksum(ranges.Checksum):
            def update(counting, data):  # noqa: N805  self is who counts
                self.checked += len(data)
                super().update(data)

        monkeypatch.setattr(os, "preadv", counted_read)
        monkeypatch.setattr(ranges, "checksum", counted_sum)
        monkeypatch.setattr(ranges, "Checksum", CountedChecksum)


def headers(folder: Path) -> int:
    return sum(file.header[0] for file in read(folder).files.values())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data())
def test_any_box_and_interval_is_read_from_any_chunks(data, tmp_path_factory):
    edge = data.draw(st.integers(0, 12))
    boxes = [Box((0, 0), (edge, 10)), Box((edge, 0), (12 - edge, 10))]
    written = []
    for box in boxes:
        middle = data.draw(st.integers(0, box.numel))
        written += [Chunk(box, 0, middle), Chunk(box, middle, box.numel - middle)]
    folder = save(tmp_path_factory.mktemp("x"), *written, chunk_bytes=data.draw(st.sampled_from([4, 40, 10**6])))
    start = data.draw(st.integers(0, 11)), data.draw(st.integers(0, 9))
    box = Box(start, (data.draw(st.integers(1, 12 - start[0])), data.draw(st.integers(1, 10 - start[1]))))
    low = data.draw(st.integers(0, box.numel))
    chunk = Chunk(box, low, data.draw(st.integers(0, box.numel - low)))
    target = torch.full((chunk.length,), -1.0)
    with StoredReader(read(folder)) as reader:
        reader.read([Piece(OF, chunk, target)])
    assert torch.equal(target, cut(chunk))


@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(12, 10),
        torch.zeros(120),
        torch.zeros(10, 12).t(),
        torch.zeros(24, 20)[::2, ::2],
        torch.zeros(240)[::2],
        torch.zeros(12, 10, dtype=torch.float64),
        torch.zeros(12, 10, dtype=torch.bfloat16),
    ],
    ids=["box", "flat", "transposed", "strided", "flat and strided", "float64", "bfloat16"],
)
@pytest.mark.parametrize("chunk_bytes", [44, 10**6])
def test_any_memory_is_filled(tmp_path, target, chunk_bytes):
    folder = save(tmp_path, chunk_bytes=chunk_bytes)
    target = target.clone()
    with StoredReader(read(folder)) as reader:
        reader.read([Piece(OF, Chunk.whole(SHAPE), target)])
    assert torch.equal(target.reshape(12, 10), VALUES.to(target.dtype))


def test_what_goes_straight_is_read_once_and_nothing_else(tmp_path, monkeypatch):
    folder = save(tmp_path, chunk_bytes=48)
    counted = Counted(monkeypatch)
    target = torch.zeros(36)
    stored = read(folder)
    # Elements 24 to 60 of chunks of 12.
    with StoredReader(stored) as reader:
        reader.read([Piece(OF, Chunk(Box((0, 0), SHAPE), 24, 36), target)])
    assert torch.equal(target, VALUES.view(-1)[24:60])
    touched = {chunk.file for chunk in stored.tensors[OF.name, OF.kind, None].chunks if 24 <= chunk.chunk.offset < 60}
    assert counted.read == counted.checked == 36 * 4 + sum(stored.files[name].header[0] for name in touched)


def test_a_chunk_wanted_by_several_pieces_is_checked_once(tmp_path, monkeypatch):
    folder = save(tmp_path)
    counted = Counted(monkeypatch)
    halves = [Piece(OF, Chunk(Box((0, 0), SHAPE), low, 60), torch.zeros(60)) for low in (0, 60)]
    rows = [Piece(OF, Chunk(Box((row, 0), (1, 10)), 0, 10), torch.zeros(10)) for row in range(12)]
    with StoredReader(read(folder)) as reader:
        reader.read(halves + rows)
        reader.read(rows)
    assert torch.equal(torch.cat([piece.data for piece in rows]), VALUES.view(-1))
    assert torch.equal(torch.cat([piece.data for piece in halves]), VALUES.view(-1))
    assert counted.checked == 480 + headers(folder)


def test_a_missing_part_is_told_before_anything_is_read(tmp_path):
    stored = read(save(tmp_path, chunk_bytes=48))
    key = (OF.name, OF.kind, None)
    less = {key: StoredTensor(OF, stored.tensors[key].chunks[:-1])}
    broken = Stored(stored.folder, stored.format, stored.version, 1, less, stored.files, {})
    target = torch.full(SHAPE, -1.0)
    with StoredReader(broken) as reader, pytest.raises(CheckpointError, match="108 of 120"):
        reader.read([Piece(OF, Chunk.whole(SHAPE), target)])
    assert (target == -1).all()


# -- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        [old] = file.read(1)
        file.seek(at)
        file.write(bytes([old ^ 4]))


@pytest.mark.parametrize("straight", [True, False])
def test_a_flipped_byte_names_file_tensor_and_kind(tmp_path, straight):
    folder = save(tmp_path, chunk_bytes=48)
    stored = read(folder)
    for chunk in stored.tensors[OF.name, OF.kind, None].chunks:
        for at in (chunk.offset, chunk.offset + chunk.nbytes - 1):
            flip(folder / chunk.file, at)
            target = torch.zeros(SHAPE, dtype=torch.float32 if straight else torch.float64)
            with StoredReader(read(folder)) as reader, pytest.raises(CheckpointError) as caught:
                reader.read([Piece(OF, Chunk.whole(SHAPE), target)])
            assert "master 'layer.w'" in caught.value.what
            assert caught.value.where == str(folder / chunk.file)
            flip(folder / chunk.file, at)


def test_a_flipped_byte_of_a_header_is_reported(tmp_path):
    folder = save(tmp_path)
    for file in read(folder).files.values():
        for at in range(file.header[0]):
            flip(folder / file.name, at)
            with StoredReader(read(folder)) as reader, pytest.raises(CheckpointError, match="header") as caught:
                reader.read([Piece(OF, Chunk.whole(SHAPE), torch.zeros(SHAPE))])
            assert caught.value.where == str(folder / file.name)
            flip(folder / file.name, at)


def test_a_file_cut_after_it_was_opened(tmp_path):
    folder = save(tmp_path, chunk_bytes=48)
    chunks = read(folder).tensors[OF.name, OF.kind, None].chunks
    with StoredReader(read(folder)) as reader:
        reader.read([Piece(OF, chunk.chunk, torch.zeros(chunk.chunk.length)) for chunk in chunks])
        last = max(chunks, key=lambda chunk: chunk.offset)
        os.truncate(folder / last.file, last.offset + 4)
        with pytest.raises(CheckpointError, match="ends before"):
            reader.read([Piece(OF, last.chunk, torch.zeros(last.chunk.length))])


# -- what other formats have ------------------------------------------------------------------------------------------


def without_checksums(folder: Path, chunks: list[StoredChunk], dtype: str = "float32") -> Stored:
    of = LogicalTensor(OF.name, OF.kind, SHAPE, dtype)
    name = chunks[0].file
    files = {name: StoredFile(name, (folder / name).stat().st_size, None)}
    return Stored(
        folder_at(folder), "other", "1", 1, {(OF.name, OF.kind, None): StoredTensor(of, tuple(chunks))}, files, {}
    )


@pytest.mark.parametrize(
    "wanted", [Chunk.whole(SHAPE), Chunk(Box((2, 3), (5, 4)), 3, 11), Chunk(Box((0, 0), SHAPE), 7, 60)]
)
@pytest.mark.parametrize("offset", [0, 3, 8])
def test_strides_and_odd_places(tmp_path, wanted, offset):
    (tmp_path / "file").write_bytes(b"x" * offset + VALUES.t().contiguous().numpy().tobytes())
    stored = without_checksums(tmp_path, [StoredChunk(Chunk.whole(SHAPE), "file", offset, 480, strides=(1, 12))])
    target = torch.zeros(wanted.length)
    with StoredReader(stored) as reader:
        reader.read([Piece(OF, wanted, target)])
    assert torch.equal(target, cut(wanted))


def test_without_a_checksum_only_what_is_wanted_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(VALUES.numpy().tobytes())
    stored = without_checksums(tmp_path, [StoredChunk(Chunk.whole(SHAPE), "file", 0, 480)])
    counted = Counted(monkeypatch)
    target = torch.zeros(7)
    with StoredReader(stored) as reader:
        reader.read([Piece(OF, Chunk(Box((0, 0), SHAPE), 50, 7), target)])
    assert torch.equal(target, VALUES.view(-1)[50:57])
    assert (counted.read, counted.checked) == (28, 0)


def test_a_format_that_keeps_no_state_of_ranks(tmp_path):
    (tmp_path / "file").write_bytes(VALUES.numpy().tobytes())
    stored = without_checksums(tmp_path, [StoredChunk(Chunk.whole(SHAPE), "file", 0, 480)])
    assert StoredReader(stored).rank_state(0) == {}


def test_two_tensors_of_the_same_bytes(tmp_path):
    """Tied weights of others' files: one is a view of the other with another shape and dtype."""
    (tmp_path / "file").write_bytes(VALUES.numpy().tobytes())
    other = LogicalTensor("other", "weight", (120,), "int32")
    stored = without_checksums(tmp_path, [StoredChunk(Chunk.whole(SHAPE), "file", 0, 480)])
    tensors = {
        **stored.tensors,
        ("other", "weight", None): StoredTensor(other, (StoredChunk(Chunk.whole((120,)), "file", 0, 480),)),
    }
    stored = Stored(folder_at(tmp_path), "other", "1", 1, tensors, stored.files, {})
    targets = torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(120, dtype=torch.int64)
    with StoredReader(stored) as reader:
        reader.read([Piece(OF, Chunk.whole(SHAPE), targets[0]), Piece(other, Chunk.whole((120,)), targets[1])])
    assert torch.equal(targets[0], VALUES.double())
    assert torch.equal(targets[1], VALUES.view(-1).view(torch.int32).long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["straight", "copied"])
def test_few_of_many_files_are_open(tmp_path, dtype, monkeypatch):
    gc.collect()
    engine = ShardedCheckpoint(ShardedConfig(writers=40, chunk_bytes=12), None)
    engine.save(tmp_path, "tag", Snapshot([Piece(OF, Chunk.whole(SHAPE), VALUES)], {}, {}), latest=False)
    stored = read(tmp_path / "tag")
    assert len(stored.files) == 40
    monkeypatch.setattr(ranges, "MAX_OPEN_FILES", 3)
    before, most, counted = len(list(Path("/proc/self/fd").iterdir())), 0, Counted(monkeypatch)
    target, open_checked = torch.zeros(SHAPE, dtype=dtype), ranges._open_checked

    def opened(*args, **options):
        nonlocal most
        found = open_checked(*args, **options)
        most = max(most, len(list(Path("/proc/self/fd").iterdir())) - before)
        return found

    monkeypatch.setattr(ranges, "_open_checked", opened)
    with StoredReader(stored) as reader:
        for _ in range(2):
            reader.read([Piece(OF, Chunk.whole(SHAPE), target)])
            assert torch.equal(target, VALUES.to(dtype))
    assert 3 <= most <= 6  # a mapped one takes two
    # What is copied is checked once, by whichever file.
    assert counted.checked == headers(tmp_path / "tag") + 480 * (1 if dtype is torch.float64 else 2)


@pytest.mark.parametrize("free", [0, 1])
def test_no_more_files_can_be_opened(tmp_path, free):
    folder = save(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    stored = read(folder)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 8, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        for _ in range(free):
            os.close(held.pop())
        with StoredReader(stored) as reader, pytest.raises(CheckpointError, match="Too many open files") as caught:
            reader.read([Piece(OF, Chunk.whole(SHAPE), torch.zeros(SHAPE, dtype=torch.float64))])
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert Path(caught.value.where).parent == folder


def test_files_are_closed(tmp_path):
    gc.collect()  # what another test has left open is not closed in between
    folder = save(tmp_path, chunk_bytes=48)
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = StoredReader(read(folder))
    reader.read([Piece(OF, Chunk.whole(SHAPE), torch.zeros(SHAPE, dtype=torch.float64))])
    assert len(list(Path("/proc/self/fd").iterdir())) > before
    reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
