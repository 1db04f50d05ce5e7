"""What ``plain`` says of checkpoints that others wrote; what it writes and reads is in ``test_plain_contract``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open

from ds_core import registry
from ds_core.checkpoint.files import write_safetensors
from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Chunk, LogicalTensor, Piece, Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHARDED = 'set checkpoint.engine to "sharded", or leave it out'


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("checkpoint.json", '{"format": "ds-sharded", "version": 1}', "this checkpoint has format 'ds-sharded'"),
        ("mp_rank_00_model_states.pt", "", "this checkpoint was written by DeepSpeed"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "", "this checkpoint was written by DeepSpeed"),
        ("zero/optimizer_state.pt", "", "this checkpoint was written by DeepSpeed"),
    ],
)
@pytest.mark.parametrize(("names", "fix"), [(("plain",), "pip install ds-ckpt"), (("plain", "sharded"), SHARDED)])
def test_what_ds_ckpt_reads_is_named(
    file: str,
    content: str,
    what: str,
    names: tuple[str, ...],
    fix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "names", lambda seam: names)
    path = tmp_path / "tag" / file
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        PlainCheckpoint(None, None).open(tmp_path, "tag")
    assert caught.value.what == f"{what}, which the engine 'plain' does not read; 'sharded' of ds-ckpt does"
    assert (caught.value.where or "").startswith(str(tmp_path / "tag"))
    assert caught.value.fix == fix


def test_a_format_nobody_knows_is_its_engine_s(tmp_path: Path) -> None:
    (tmp_path / "tag").mkdir()
    (tmp_path / "tag" / "checkpoint.json").write_text('{"format": "tapes"}')
    with pytest.raises(CheckpointError, match="has format 'tapes'") as caught:
        PlainCheckpoint(None, None).open(tmp_path, "tag")
    assert caught.value.fix == "set checkpoint.engine to the engine that wrote it"


# -- what cannot be believed ------------------------------------------------------------------------------------------

OF = LogicalTensor("w", "weight", (4, 6), "float32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a checkpoint of one tensor in two chunks."""
    box = Chunk.whole(OF.shape).box
    pieces = [Piece(OF, Chunk(box, low, 12), torch.arange(12.0) + low) for low in (0, 12)]
    PlainCheckpoint(None, None).save(tmp_path, "tag", Snapshot(pieces, {"steps": 1}, {"rank": 0}), latest=True)
    return tmp_path / "tag"


def opened(folder: Path) -> torch.Tensor:
    with PlainCheckpoint(None, None).open(folder.parent, folder.name) as reader:
        data = torch.full((4, 6), -1.0)
        reader.read([Piece(OF, Chunk.whole(OF.shape), data)])
    return data


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "checkpoint.json").read_text())
    change(content)
    (folder / "checkpoint.json").write_text(json.dumps(content))


def change_rows(folder: Path, change: Callable[[list[Any]], object]) -> None:
    """Change the table of the only file, and the manifest's size of it."""
    path = next(folder.glob("*.safetensors"))
    with safe_open(path, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), [(key, file.get_tensor(key)) for key in file.keys()]  # noqa: SIM118
    rows = json.loads(metadata["pieces"])
    change(rows)
    size = write_safetensors(path, tensors, {**metadata, "pieces": json.dumps(rows)})
    change_manifest(folder, lambda manifest: manifest["files"].update({path.name: size}))


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/etc/hostname", "sub/x", "checkpoint.json", ""])
def test_nothing_outside_its_folder_is_read(name: str, folder: Path) -> None:
    own = next(folder.glob("*.safetensors"))
    size = own.stat().st_size
    own.rename(folder.parent.parent / "outside.safetensors")
    change_manifest(folder, lambda manifest: manifest.update(files={name: size}))
    with pytest.raises(CheckpointError, match="no file of a checkpoint"):
        opened(folder)


def test_a_link_is_not_followed(folder: Path) -> None:
    own = next(folder.glob("*.safetensors"))
    moved = own.rename(folder.parent / "moved")
    own.symlink_to(moved)
    with pytest.raises(CheckpointError, match="is a link") as caught:
        opened(folder)
    assert caught.value.where == str(own)


@pytest.mark.parametrize(
    "change",
    [
        *(lambda m, key=key: m.pop(key) for key in ("version", "world_size", "files", "state")),
        lambda m: m.update(version="1"),
        lambda m: m.update(world_size="1"),
        lambda m: m.update(world_size=2),
        lambda m: m.update(files=[]),
        lambda m: m.update(files={}),
        lambda m: m.update(files={name: str(size) for name, size in m["files"].items()}),
        lambda m: m.update(state=None),
    ],
)
def test_a_manifest_without_what_it_must_have_is_damaged(change: Callable[..., object], folder: Path) -> None:
    change_manifest(folder, change)
    with pytest.raises(CheckpointError, match="the manifest is damaged") as caught:
        opened(folder)
    assert caught.value.where == str(folder / "checkpoint.json")


def test_a_manifest_that_is_nested_too_deeply_is_damaged(folder: Path) -> None:
    (folder / "checkpoint.json").write_text("[" * 10**5 + "]" * 10**5)
    with pytest.raises(CheckpointError, match="the manifest is damaged"):
        opened(folder)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        # Chunks that overlap and a hole: as many elements as there are, and some of them are never filled.
        (lambda rows: rows[1].update(interval=[6, 12]), "overlap"),
        (lambda rows: rows[1].update(interval=[0, 12]), "overlap"),
        (lambda rows: rows.pop(), "12 of 24 elements"),
        (lambda rows: rows.append(rows[0]), "36 of 24 elements"),
        (lambda rows: [row.update(shape=[10**6, 10**6]) for row in rows], "12 of|24 of"),
        (lambda rows: rows[1].update(shape=[6, 6]), "not what another row"),
        (lambda rows: rows[1].update(interval=[12, 13]), "not inside"),
        (lambda rows: rows[1].update(box=[[1, 0], [4, 6]]), "not inside"),
        (lambda rows: rows[1].update(interval=[15, 9]), "not what another row or the file"),
        (lambda rows: rows[1].update(interval=[12.0, 12]), "whole numbers"),
        (lambda rows: rows[1].update(interval=[-1, 12]), "whole numbers"),
        (lambda rows: rows[1].update(box=[[0], [4]]), "cannot be read"),
        (lambda rows: rows[1].update(dtype="complex"), "no tensor"),
        (lambda rows: rows[1].update(name=["w"]), "no tensor"),
        (lambda rows: rows[1].update(rank="0"), "whole numbers"),
        (lambda rows: rows[1].update(key="nothing"), "nothing"),
        (lambda rows: rows[1].pop("kind"), "kind"),
        (lambda rows: rows.append(None), "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_is_refused_before_anything_is_read(
    change: Callable[[list[Any]], object], what: str, folder: Path
) -> None:
    assert torch.equal(opened(folder), torch.arange(24.0).view(4, 6))
    change_rows(folder, change)
    with pytest.raises(CheckpointError, match=what) as caught:
        PlainCheckpoint(None, None).open(folder.parent, folder.name)
    assert str(caught.value.where).startswith(str(folder))
