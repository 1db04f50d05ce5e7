"""Engines that were written for DeepSpeed's interface, as entries of the seam."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_core.checkpoint.adapter import AdaptedCheckpoint
from ds_core.checkpoint.deepspeed_interface import CheckpointCommitInfo, CheckpointEngine
from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.config import PositiveInt, Section
from ds_core.errors import CheckpointError
from ds_core.testing.checkpoint import CheckpointEngineContract, check_content, snapshot
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.ranks import run_ranks


class TorchEngine(CheckpointEngine):
    """The shortest one."""

    def create(self, info):
        pass

    def save(self, state_dict, path):
        torch.save(state_dict, path)

    def load(self, path, map_location=None):
        return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info):
        return True


class TorchFilesCheckpoint(AdaptedCheckpoint):
    files = TorchEngine


class LateEngine(TorchEngine):
    """Decoupled: keeps what it was given, and writes at the commit, by Python's own files."""

    def __init__(self, config_params=None):
        super().__init__(config_params)
        self.waiting, self.info, self.calls = {}, None, []

    def create(self, info):
        self.calls.append("create")

    def save(self, state_dict, path):
        self.waiting[path] = state_dict

    def commit(self, info):
        assert info is self.info
        for path, content in self.waiting.items():
            with Path(path).open("wb") as file:
                torch.save(content, file)
        self.waiting.clear()
        self.calls.append("commit")
        return True

    def is_decoupled(self):
        return True

    def set_commit_info(self, info):
        self.info = info

    def get_commit_info(self):
        return self.info

    def cleanup(self):
        self.calls.append("cleanup")


class LateCheckpoint(AdaptedCheckpoint):
    files = LateEngine


class TestTorchEngine(CheckpointEngineContract):
    @pytest.fixture
    def engine(self):
        return TorchFilesCheckpoint(None, None)


class TestDecoupledEngine(CheckpointEngineContract):
    @pytest.fixture
    def engine(self):
        return LateCheckpoint(None, None)


def test_the_manifest_of_a_decoupled_engine_is_written_at_the_commit(tmp_path: Path) -> None:
    engine = LateCheckpoint(None, None)
    engine.save(tmp_path, "tag", snapshot(1), latest=True)
    assert not list(tmp_path.rglob("checkpoint.json"))
    assert not (tmp_path / "latest").exists()
    engine.commit()
    check_content(engine, tmp_path, "tag", 1)
    engine.save(tmp_path, "next", snapshot(2), latest=True)
    engine.close()
    engine.close()
    check_content(engine, tmp_path, "next", 2)
    assert engine._files.calls == ["create", "commit", "create", "commit", "cleanup"]


class Options(Section):
    level: PositiveInt = 3


class Configured(AdaptedCheckpoint):
    Config, files = Options, TorchEngine


def test_options_reach_the_engine() -> None:
    assert Configured(Options(level=7), None)._files.config_params == {"level": 7}
    assert TorchFilesCheckpoint(None, None)._files.config_params is None


class Silent(TorchEngine):
    def save(self, state_dict, path):
        pass


class Empty(TorchEngine):
    def save(self, state_dict, path):
        Path(path).touch()


class Refuses(TorchEngine):
    def commit(self, info):
        return False


class Breaks(TorchEngine):
    def save(self, state_dict, path):
        Path(path).write_text("half of it")
        raise RuntimeError("broken on purpose")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (Silent, "Silent has written nothing"),
        (Empty, "Empty has written nothing"),
        (Refuses, r"Refuses.commit\(\) returned False"),
        (Breaks, "RuntimeError: broken on purpose"),
    ],
)
def test_an_engine_that_did_not_write_is_found_out(tmp_path: Path, files: type[CheckpointEngine], said: str) -> None:
    TorchFilesCheckpoint(None, None).save(tmp_path, "tag", snapshot(1), latest=True)
    before = sorted(tmp_path.rglob("*"))
    engine = type("Adapted", (AdaptedCheckpoint,), {"files": files})(None, None)
    with pytest.raises(CheckpointError, match=said):
        engine.save(tmp_path, "tag", snapshot(2), latest=True)
    assert sorted(tmp_path.rglob("*")) == before
    check_content(engine, tmp_path, "tag", 1)


class Beside(TorchEngine):
    """Writes two files where it was given one name."""

    def save(self, state_dict, path):
        whole = io.BytesIO()
        torch.save(state_dict, whole)
        for part, data in enumerate((whole.getvalue()[:1000], whole.getvalue()[1000:])):
            Path(f"{path}-{part}").write_bytes(data)

    def load(self, path, map_location=None):
        whole = io.BytesIO(b"".join(Path(f"{path}-{part}").read_bytes() for part in range(2)))
        return torch.load(whole, map_location=map_location, weights_only=True)


class BesideCheckpoint(AdaptedCheckpoint):
    files = Beside


def test_files_beside_the_one_that_was_named_belong_to_the_checkpoint(tmp_path: Path) -> None:
    engine = BesideCheckpoint(None, None)
    for version in (1, 2):
        engine.save(tmp_path, "tag", snapshot(version), latest=True)
        check_content(engine, tmp_path, "tag", version)
        assert len(list((tmp_path / "tag").iterdir())) == 3
    next((tmp_path / "tag").glob("*.pt-1")).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        engine.open(tmp_path, "tag")


def test_engines_replace_each_others_checkpoints_under_one_tag(tmp_path: Path) -> None:
    for version, engine in enumerate([PlainCheckpoint(None, None), BesideCheckpoint(None, None)] * 2, start=1):
        engine.save(tmp_path, "tag", snapshot(version), latest=True)
        check_content(engine, tmp_path, "tag", version)
    PlainCheckpoint(None, None).save(tmp_path, "tag", snapshot(9), latest=True)
    assert len(list((tmp_path / "tag").iterdir())) == 2
    with pytest.raises(CheckpointError, match="has format 'ds-plain'"):
        engine.open(tmp_path, "tag")


class Seen(TorchEngine):
    def save(self, state_dict, path):
        seen.update({key: value.untyped_storage().nbytes() for key, value in state_dict.items()})
        super().save(state_dict, path)


class Clones(Seen):
    def preserves_storage_sharing(self):
        return False


seen: dict[str, int] = {}


@pytest.mark.parametrize(("files", "nbytes"), [(Seen, 4 * 6), (Clones, 4 * 100)])
def test_a_view_does_not_bring_all_of_its_storage(tmp_path: Path, files: type[CheckpointEngine], nbytes: int) -> None:
    from ds_core.interfaces.logical import Chunk, LogicalTensor, Piece, Snapshot

    of = LogicalTensor("w", "weight", (2, 3), "float32")
    engine = type("Adapted", (AdaptedCheckpoint,), {"files": files})(None, None)
    view = torch.zeros(100)[10:16].view(2, 3)
    engine.save(tmp_path, "tag", Snapshot([Piece(of, Chunk.whole(of.shape), view)], {}, {}), latest=False)
    assert seen == {"weight:w": nbytes}
    seen.clear()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "ds-other"}, "has format 'ds-other'"),
        ({"version": 2}, "version 2"),
        ({"files": {"../../outside.pt": 1}}, "no file of a checkpoint"),
        ({"files": {"rank_00000-0123456789ab.pt/../x": 1}}, "no file of a checkpoint"),
        ({"ranks": [{}]}, "the manifest is damaged"),
        ({"ranks": []}, "the manifest is damaged: 0 ranks"),
        ({"world_size": 2}, "the manifest is damaged: 1 ranks"),
        ({"world_size": "1"}, "the manifest is damaged"),
        ({"state": None}, "a state is missing"),
        *(
            ({"ranks": [{"file": file, "rank_state": {}, "tensors": []}]}, "which is no file of it")
            for file in ("../../outside.pt", "/etc/passwd", "rank_00001-0123456789ab.pt", "", "r", 5)
        ),
        ({"ranks": None}, "the manifest is damaged"),
        ({"files": []}, "the manifest is damaged"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    engine = TorchFilesCheckpoint(None, None)
    engine.save(tmp_path, "tag", snapshot(1), latest=True)
    manifest = tmp_path / "tag" / "checkpoint.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(CheckpointError, match=said):
        engine.open(tmp_path, "tag")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    engine = TorchFilesCheckpoint(None, None)
    engine.save(tmp_path, "tag", snapshot(1), latest=True)
    path = next((tmp_path / "tag").glob("*.pt"))
    size = path.stat().st_size
    for content in ({}, dict.fromkeys(torch.load(path, weights_only=True), 1)):
        torch.save(content, path)
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        with pytest.raises(CheckpointError, match=r"cannot read a file|has no tensor"):
            check_content(engine, tmp_path, "tag", 1)


def given(version: int) -> Any:
    import torch.distributed as dist

    return snapshot(version, rank=dist.get_rank(), world_size=2, parts=2)


def _close_waits_for_nobody(directory: str) -> None:
    """Rank 0 comes to no collective of the closing rank; what was complete stays."""
    import torch.distributed as dist

    engine, folder = LateCheckpoint(None, dist.group.WORLD), Path(directory)
    engine.save(folder, "first", given(1), latest=True)
    engine.commit()
    engine.save(folder, "second", given(2), latest=True)
    if dist.get_rank() == 1:
        with pytest.raises(CheckpointError, match="'second' was saved but never committed, and is discarded"):
            engine.close()
        engine.close()
        assert engine._files.calls[-1] == "cleanup"
    dist.barrier()
    if dist.get_rank() == 0:
        with pytest.raises(CheckpointError, match="never committed"):
            engine.close()
    dist.barrier()
    assert (folder / "latest").read_text() == "first"
    assert not list((folder / "second").iterdir())
    check_content(LateCheckpoint(None, None), folder, "first", 1)


def _engine() -> Any:
    import ds_core

    config = {"train_micro_batch_size_per_gpu": 1, "checkpoint": {"engine": "plain"}}
    engine = ds_core.initialize(model=torch.nn.Linear(2, 2), config=config)[0]
    engine.parts = replace(engine.parts, checkpoint=LateCheckpoint(None, engine.parts.group))
    return engine


def _an_orderly_end_commits(directory: str) -> None:
    engine = _engine()
    engine.save_checkpoint(directory, "orderly")
    engine.destroy()
    assert (Path(directory) / "latest").read_text() == "orderly"


def _an_error_on_its_way_up_does_not(directory: str) -> None:
    engine = _engine()
    engine.save_checkpoint(directory, "never")

    def end() -> None:
        try:
            raise ZeroDivisionError
        finally:
            engine.destroy()

    with pytest.raises(CheckpointError, match="never committed") as caught:
        end()
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    assert not (Path(directory) / "latest").exists()


def test_who_ends_early_waits_for_nobody(tmp_path: Path) -> None:
    cases = (_close_waits_for_nobody, _an_orderly_end_commits, _an_error_on_its_way_up_does_not)
    folders = {case: tmp_path / case.__name__ for case in cases}
    for folder in folders.values():
        folder.mkdir()
    run_ranks([partial(case, str(folder)) for case, folder in folders.items()], 2, timeout_s=20)


def test_the_info_is_deepspeeds() -> None:
    info = CheckpointCommitInfo(tag="step", save_dir="runs", save_latest=True)
    assert (info.tag, info.save_dir, info.save_latest) == ("step", "runs", True)
