"""Contract of the seam ``checkpoint``; inherit :class:`CheckpointEngineContract` in a plugin's tests.

What is saved depends on a version number alone, so that a reader can say which save it sees, and whether whole.

An engine may write in the background: wherever a checkpoint must be there, ``commit`` was called.
"""

from __future__ import annotations

import itertools
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ds_core.errors import CheckpointError, NoCheckpointError
from ds_core.interfaces.logical import BUFFER, GRADIENT, MASTER, WEIGHT, Box, Chunk, LogicalTensor, Piece, Snapshot
from ds_core.testing import _checkpoint_crash, crash
from ds_core.testing.ranks import expect_rank_errors, run_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ds_core.config import Section
    from ds_core.interfaces.checkpoint import CheckpointEngine

__all__ = ["CheckpointEngineContract", "check_content", "pieces_of", "snapshot"]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
SHAPES: dict[str, tuple[int, ...]] = {"matrix": (7, 5), "cube": (3, 2, 5), "row": (13,), "scalar": (), "empty": (0, 4)}


def content(of: LogicalTensor, version: int) -> Tensor:
    """Return the whole tensor of ``version``; differs in every element that can."""
    generator = torch.Generator().manual_seed(1000 * version + sum(map(ord, f"{of.name}{of.kind}{of.rank}")))
    values = torch.randint(0, 2**8, of.shape, generator=generator)
    return values % 2 == version % 2 if of.dtype == "bool" else values.to(DTYPES[of.dtype])


def tensors(world_size: int = 1) -> list[LogicalTensor]:
    """Return what a checkpoint of the contract holds."""
    found = [
        LogicalTensor(f"{dtype}.{name}", kind, shape, dtype)
        for dtype in DTYPES
        for name, shape in SHAPES.items()
        for kind in ([WEIGHT, MASTER, "exp_avg"] if dtype == "float32" else [BUFFER])
    ]
    return found + [LogicalTensor("partial", GRADIENT, (4, 3), "float32", rank=rank) for rank in range(world_size)]


def chunks(shape: tuple[int, ...], parts: int) -> list[Chunk]:
    """Return ``shape`` cut into ``parts`` flat intervals, odd ones as boxes of rows where there are enough rows."""
    if parts > 1 and shape and shape[0] >= parts and shape[0] % 2:
        edges = [shape[0] * part // parts for part in range(parts + 1)]
        boxes = [
            Box((low, *[0] * (len(shape) - 1)), (high - low, *shape[1:])) for low, high in itertools.pairwise(edges)
        ]
        return [Chunk(box, 0, box.numel) for box in boxes]
    whole = Chunk.whole(shape)
    edges = [whole.length * part // parts for part in range(parts + 1)]
    return [Chunk(whole.box, low, high - low) for low, high in itertools.pairwise(edges)]


def pieces_of(of: LogicalTensor, parts: int, version: int, world_size: int = 1) -> list[Piece]:
    """Return ``of`` in ``parts`` pieces, which the ranks write in turn; a partial gradient's by its rank."""
    whole = content(of, version)
    found = []
    for index, chunk in enumerate(chunks(of.shape, parts)):
        box = whole[tuple(slice(s, s + n) for s, n in zip(chunk.box.start, chunk.box.size, strict=True))]
        data = (
            box.clone() if chunk.is_whole_box else box.reshape(-1)[chunk.offset : chunk.offset + chunk.length].clone()
        )
        writer = index % world_size if of.rank is None else of.rank
        found.append(Piece(of, chunk, data, writer))
    return found


def snapshot(version: int, *, parts: int = 1, rank: int = 0, world_size: int = 1) -> Snapshot:
    """Return what ``rank`` gives to a save: every piece is there, also those that others write."""
    pieces = [
        piece
        for of in tensors(world_size)
        if of.rank in (None, rank)
        for piece in pieces_of(of, parts, version, world_size)
    ]
    state = {"version": version, "nested": {"list": [1, 2.5, None, True, "text \u00e9"], "empty": {}}, "big": 2**60}
    return Snapshot(pieces, state, {"rank": rank, "version": version})


def check_content(engine: CheckpointEngine, directory: Path, tag: str, version: int, *, parts: int = 1) -> None:
    """Assert that ``tag`` is all of ``version``, reading it in ``parts`` pieces per tensor."""
    with engine.open(directory, tag) as reader:
        assert reader.state == snapshot(version).state
        for rank in range(reader.world_size):
            assert reader.rank_state(rank) == {"rank": rank, "version": version}
        stored = reader.tensors()
        assert len(stored) == len(set(stored)), "each once"
        assert set(stored) == set(tensors(reader.world_size))
        expected = [piece for of in stored for piece in pieces_of(of, parts, version)]
        wanted = [Piece(p.of, p.chunk, torch.full_like(p.data, 77), p.writer) for p in expected]
        reader.read(wanted)
    for got, piece in zip(wanted, expected, strict=True):
        assert torch.equal(got.data, piece.data), f"{piece.of} {piece.chunk}"


def save_and_commit(
    engine: CheckpointEngine, directory: Path, tag: str, given: Snapshot, *, latest: bool = True
) -> None:
    """Save, and return once it is durable; this is where the failure of any engine is raised."""
    engine.save(directory, tag, given, latest=latest)
    engine.commit()


class CheckpointEngineContract:
    """What every checkpoint engine promises."""

    @pytest.fixture
    def engine(self) -> CheckpointEngine:
        """Override: an engine for one process, ``group=None``; its class importable by name."""
        raise NotImplementedError

    @pytest.mark.parametrize("written", [1, 2, 3])
    @pytest.mark.parametrize("read", [1, 2, 5])
    def test_any_chunks_are_read_in_any_others(
        self, engine: CheckpointEngine, tmp_path: Path, written: int, read: int
    ) -> None:
        save_and_commit(engine, tmp_path, "tag", snapshot(1, parts=written))
        check_content(engine, tmp_path, "tag", 1, parts=read)

    def test_latest_names_the_tag_when_asked(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        save_and_commit(engine, tmp_path, "quiet", snapshot(1), latest=False)
        assert not (tmp_path / "latest").exists()
        save_and_commit(engine, tmp_path, "first", snapshot(2))
        save_and_commit(engine, tmp_path, "quiet", snapshot(3), latest=False)
        assert (tmp_path / "latest").read_text().strip() == "first"
        check_content(engine, tmp_path, "first", 2)
        check_content(engine, tmp_path, "quiet", 3)

    def test_saving_again_replaces(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        for version in (1, 2, 3):
            save_and_commit(engine, tmp_path, "tag", snapshot(version, parts=version))
            check_content(engine, tmp_path, "tag", version)

    def test_saving_leaves_the_tensors_as_they_are(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        given = snapshot(1)
        before = [piece.data.clone() for piece in given.pieces]
        engine.save(tmp_path, "tag", given, latest=True)
        assert all(torch.equal(piece.data, old) for piece, old in zip(given.pieces, before, strict=True))
        engine.commit()
        check_content(engine, tmp_path, "tag", 1)

    def test_what_was_given_may_change_right_after_a_save(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        """Durable or not by then: what happens to the memory is nobody's business. Saves follow each other closely."""
        for version in (1, 2, 3):
            given = snapshot(version, parts=version)
            engine.save(tmp_path, f"tag{version}", given, latest=True)
            for piece in given.pieces:
                piece.data.zero_()
            for part in (given.state, given.rank_state):
                assert isinstance(part, dict)
                part["version"] = 77
            given.state["nested"]["list"].clear()
        engine.commit()
        for version in (1, 2, 3):
            check_content(engine, tmp_path, f"tag{version}", version)

    def test_strides_do_not_matter(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        of = LogicalTensor("w", WEIGHT, (4, 6), "float32")
        values = torch.arange(24.0).view(4, 6)
        spread = torch.zeros(6, 8).t()[::2]
        spread.copy_(values)
        whole = Chunk.whole(of.shape)
        save_and_commit(engine, tmp_path, "tag", Snapshot([Piece(of, whole, spread)], {}, {}))
        target = torch.zeros(6, 4).t()
        with engine.open(tmp_path, "tag") as reader:
            reader.read([Piece(of, whole, target)])
        assert torch.equal(target, values)

    def test_parameters_are_read_in_place(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        save_and_commit(engine, tmp_path, "tag", snapshot(1))
        of = LogicalTensor("float32.matrix", WEIGHT, (7, 5), "float32")
        param = torch.nn.Parameter(torch.zeros(7, 5))
        with engine.open(tmp_path, "tag") as reader:
            reader.read([Piece(of, Chunk.whole(of.shape), param)])
        assert torch.equal(param, content(of, 1))
        assert param.is_leaf

    @pytest.mark.parametrize(("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16")])
    def test_dtypes_are_converted(self, engine: CheckpointEngine, tmp_path: Path, stored: str, wanted: str) -> None:
        save_and_commit(engine, tmp_path, "tag", snapshot(1, parts=2))
        kind = WEIGHT if stored == "float32" else BUFFER
        target = torch.zeros(7, 5, dtype=DTYPES[wanted])
        with engine.open(tmp_path, "tag") as reader:
            reader.read([Piece(LogicalTensor(f"{stored}.matrix", kind, (7, 5), wanted), Chunk.whole((7, 5)), target)])
        expected = content(LogicalTensor(f"{stored}.matrix", kind, (7, 5), stored), 1)
        assert torch.equal(target, expected.to(target.dtype))

    def test_a_missing_tensor_is_named(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        save_and_commit(engine, tmp_path, "tag", snapshot(1))
        for name, kind in (("nobody.weight", WEIGHT), ("float32.matrix", "exp_avg_sq")):
            with engine.open(tmp_path, "tag") as reader, pytest.raises(CheckpointError) as caught:
                reader.read([_empty(LogicalTensor(name, kind, (7, 5), "float32"))])
            assert name in str(caught.value)
            assert kind in str(caught.value)

    @pytest.mark.parametrize("shape", [(5, 7), (7, 6), (35,), (7, 5, 1), ()])
    def test_another_shape_is_named(self, engine: CheckpointEngine, tmp_path: Path, shape: tuple[int, ...]) -> None:
        save_and_commit(engine, tmp_path, "tag", snapshot(1))
        with engine.open(tmp_path, "tag") as reader, pytest.raises(CheckpointError, match=r"float32\.matrix"):
            reader.read([_empty(LogicalTensor("float32.matrix", WEIGHT, shape, "float32"))])

    def test_what_is_not_there_names_what_is(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="elsewhere"):
            engine.open(tmp_path / "elsewhere", "tag")
        save_and_commit(engine, tmp_path, "complete-one", snapshot(1))
        (tmp_path / "half").mkdir()
        for tag in ("nowhere", "half"):
            with pytest.raises(CheckpointError) as caught:
                engine.open(tmp_path, tag)
            assert tag in str(caught.value)
            assert "complete-one" in str(caught.value.fix)

    def test_every_file_is_needed(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        """A checkpoint with a file missing, cut short or empty is refused when opened or read, never half loaded."""
        save_and_commit(engine, tmp_path, "other", snapshot(1), latest=False)
        save_and_commit(engine, tmp_path, "tag", snapshot(2))
        files = [path for path in (tmp_path / "tag").rglob("*") if path.is_file()]
        assert files
        for path in files:
            whole = path.read_bytes()
            for damaged in (None, whole[:-1], whole[: len(whole) // 2], b""):
                if damaged is None:
                    path.unlink()
                else:
                    path.write_bytes(damaged)
                with pytest.raises(CheckpointError):
                    check_content(engine, tmp_path, "tag", 2)
                path.write_bytes(whole)
        check_content(engine, tmp_path, "tag", 2)

    def test_a_checkpoint_can_be_moved(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        save_and_commit(engine, tmp_path, "tag", snapshot(1))
        shutil.move(tmp_path / "tag", tmp_path / "sub" / "renamed")
        check_content(engine, tmp_path / "sub", "renamed", 1)

    def test_a_save_that_fails_leaves_the_previous(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        save_and_commit(engine, tmp_path, "tag", snapshot(1))
        (tmp_path / "blocked").write_text("a file where the folder should be")
        with pytest.raises(CheckpointError):
            save_and_commit(engine, tmp_path, "blocked", snapshot(2))
        assert (tmp_path / "latest").read_text().strip() == "tag"
        check_content(engine, tmp_path, "tag", 1)

    def test_latest_is_read_back(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        with pytest.raises(NoCheckpointError, match="elsewhere"):
            engine.read_latest(tmp_path / "elsewhere")
        save_and_commit(engine, tmp_path, "quiet", snapshot(1), latest=False)
        with pytest.raises(CheckpointError) as caught:
            engine.read_latest(tmp_path)
        assert "latest" in caught.value.what
        assert "quiet" in str(caught.value.fix)
        for version, tag in enumerate(("first", "second", "first")):
            save_and_commit(engine, tmp_path, tag, snapshot(version))
            assert engine.read_latest(tmp_path) == tag

    def test_commit_without_a_save(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        engine.commit()
        engine.save(tmp_path, "tag", snapshot(1), latest=True)
        engine.commit()
        engine.commit()
        check_content(engine, tmp_path, "tag", 1)

    def test_a_failure_is_told_once(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        """By the save, or by the commit after it; then saving goes on."""
        (tmp_path / "blocked").write_text("a file where the folder should be")
        with pytest.raises(CheckpointError, match="blocked"):
            save_and_commit(engine, tmp_path, "blocked", snapshot(1))
        engine.commit()
        save_and_commit(engine, tmp_path, "tag", snapshot(2))
        check_content(engine, tmp_path, "tag", 2)

    def test_the_next_save_tells_of_a_failure(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        """Where the failing one did not tell itself. The next one was not begun then."""
        (tmp_path / "blocked").write_text("a file where the folder should be")
        with pytest.raises(CheckpointError, match="blocked"):
            _save_two(engine, tmp_path, "blocked", "tag")
        engine.commit()
        assert not (tmp_path / "tag").exists()
        save_and_commit(engine, tmp_path, "tag", snapshot(2))
        check_content(engine, tmp_path, "tag", 2)

    def test_close_waits_as_commit_does(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        engine.save(tmp_path, "tag", snapshot(1), latest=True)
        engine.close()
        engine.close()
        check_content(type(engine)(engine.options, None), tmp_path, "tag", 1)

    def test_two_engines_of_one_process(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        other = type(engine)(engine.options, None)
        for version, one in enumerate((engine, other, other, engine), start=1):
            one.save(tmp_path, f"tag{version}", snapshot(version), latest=True)
        other.close()
        engine.commit()
        for version in range(1, 5):
            check_content(engine, tmp_path, f"tag{version}", version)

    @pytest.mark.parametrize("tag", ["same", "next"])
    def test_a_crash_at_any_point_leaves_a_whole_checkpoint(
        self, engine: CheckpointEngine, tmp_path: Path, tag: str
    ) -> None:
        """SIGKILL before every file operation of a save, and in the midst of writing: old or new, but whole."""
        points = _checkpoint_crash.kill_saves(type(engine), engine.options, tmp_path, tag)
        assert points >= 3, "the save was killed at too few points to mean anything"

    def test_ranks_save_together(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        """Written by 2 ranks, read by 2 and by 1; then overwritten by one process alone."""
        run_ranks([partial(_save_on_rank, type(engine), engine.options, str(tmp_path))], 2)
        check_content(engine, tmp_path, "tag", 4, parts=3)
        with engine.open(tmp_path, "tag") as reader:
            assert reader.world_size == 2
        save_and_commit(engine, tmp_path, "tag", snapshot(5))
        check_content(engine, tmp_path, "tag", 5)

    def test_one_rank_fails_all_fail(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        save_and_commit(engine, tmp_path, "tag", snapshot(1))
        for function in (_full_disk_on_rank_1, _bad_state_on_rank_1):
            errors = expect_rank_errors(
                partial(function, type(engine), engine.options, str(tmp_path)), 2, timeout_s=20.0
            )
            assert sorted(errors) == [0, 1], errors
            assert all(error.startswith("CheckpointError") for error in errors.values()), errors
            reason = errors[1].splitlines()[0].removeprefix("CheckpointError: ")
            assert "rank 1" in errors[0], errors
            assert reason in errors[0], errors
            assert (tmp_path / "latest").read_text().strip() == "tag"
            check_content(engine, tmp_path, "tag", 1)

    def test_all_ranks_are_told_once(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        """Of a failure on one of them; then they go on saving together."""
        run_ranks([partial(_told_once, type(engine), engine.options, str(tmp_path))], 2)
        check_content(engine, tmp_path, "next", 2, parts=3)

    def test_a_rank_killed_in_a_save(self, engine: CheckpointEngine, tmp_path: Path) -> None:
        """The others end with an error, and what was there is still there."""
        save_and_commit(engine, tmp_path, "tag", snapshot(1))
        errors = expect_rank_errors(
            partial(_killed_on_rank_1, type(engine), engine.options, str(tmp_path)), 2, timeout_s=20.0
        )
        assert errors[1] == "Signal: SIGKILL"
        kind, _, reason = errors[0].partition(": ")
        assert kind == "CheckpointError", errors
        assert "lost each other" in reason or "gone" in reason, errors
        check_content(engine, tmp_path, "tag", 1)


def _save_two(engine: CheckpointEngine, directory: Path, first: str, second: str) -> None:
    for tag in (first, second):
        engine.save(directory, tag, snapshot(1), latest=True)


def _empty(of: LogicalTensor) -> Piece:
    return Piece(of, Chunk.whole(of.shape), torch.zeros(of.shape))


def _on_rank(cls: type[CheckpointEngine], options: Section | None) -> tuple[CheckpointEngine, int]:
    import torch.distributed as dist

    return cls(options, dist.group.WORLD), dist.get_rank()


def _save_on_rank(cls: type[CheckpointEngine], options: Section | None, directory: str) -> None:
    engine, rank = _on_rank(cls, options)
    for version in (3, 4):
        engine.save(Path(directory), "tag", snapshot(version, parts=3, rank=rank, world_size=2), latest=True)
    engine.commit()
    check_content(engine, Path(directory), "tag", 4, parts=2)


def _full_disk_on_rank_1(cls: type[CheckpointEngine], options: Section | None, directory: str) -> None:
    engine, rank = _on_rank(cls, options)
    given = snapshot(2, rank=rank, world_size=2, parts=2)
    with crash.limited_file_size(1000) if rank == 1 else nullcontext():
        save_and_commit(engine, Path(directory), "tag", given)


def _told_once(cls: type[CheckpointEngine], options: Section | None, directory: str) -> None:
    engine, rank = _on_rank(cls, options)
    given = snapshot(1, rank=rank, world_size=2, parts=2)
    with crash.limited_file_size(1000) if rank == 1 else nullcontext(), pytest.raises(CheckpointError):
        save_and_commit(engine, Path(directory), "tag", given)
    engine.commit()
    save_and_commit(engine, Path(directory), "next", snapshot(2, rank=rank, world_size=2, parts=2))
    engine.close()


def _bad_state_on_rank_1(cls: type[CheckpointEngine], options: Section | None, directory: str) -> None:
    engine, rank = _on_rank(cls, options)
    given = snapshot(2, rank=rank, world_size=2)
    state: dict[str, Any] = {"not_json": object()} if rank == 1 else dict(given.rank_state)
    save_and_commit(engine, Path(directory), "next", Snapshot(given.pieces, given.state, state))


def _killed_on_rank_1(cls: type[CheckpointEngine], options: Section | None, directory: str) -> None:
    engine, rank = _on_rank(cls, options)
    if rank == 1:
        crash.die_at(point=2)
    save_and_commit(engine, Path(directory), "tag", snapshot(2, rank=rank, world_size=2, parts=2))


def load_version(engine: CheckpointEngine, directory: Path, allowed: Sequence[int]) -> int:
    """Return the version that ``latest`` leads to, having checked that all of it is there."""
    tag = (directory / "latest").read_text().strip()
    with engine.open(directory, tag) as reader:
        version: int = reader.state["version"]
    assert version in allowed, f"version {version} after a crash, expected one of {allowed}"
    check_content(engine, directory, tag, version)
    return version
