"""The engine beside its contract: formats over each other, memory, options."""

from __future__ import annotations

import pytest
import torch

import ds_core
from ds_ckpt.config import ShardedConfig
from ds_ckpt.formats import read
from ds_ckpt.sharded import ShardedCheckpoint
from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.errors import CheckpointError, DsError
from ds_core.interfaces.logical import Chunk, LogicalTensor, Piece, Snapshot
from ds_core.testing.checkpoint import check_content, snapshot
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.memory import LiveStorage


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_engines_replace_each_others_checkpoints_under_one_tag(tmp_path):
    sharded, plain = ShardedCheckpoint(ShardedConfig(writers=2, chunk_bytes=100), None), PlainCheckpoint(None, None)
    for version, engine in enumerate((plain, sharded, plain, sharded), start=1):
        engine.save(tmp_path, "tag", snapshot(version), latest=True)
        check_content(sharded, tmp_path, "tag", version)
        assert names(tmp_path / "tag") == sorted(["checkpoint.json", *read(tmp_path / "tag").files])


def test_files_of_others_in_the_folder_stay(tmp_path):
    (tmp_path / "tag").mkdir()
    for name in ("notes.txt", "model.safetensors", "rank_0.safetensors"):
        (tmp_path / "tag" / name).write_text("mine")
    (tmp_path / "tag" / "rank_00009_1-0123456789ab.safetensors").write_text("torn")
    ShardedCheckpoint(None, None).save(tmp_path, "tag", snapshot(1), latest=True)
    assert {"notes.txt", "model.safetensors", "rank_0.safetensors"} < set(names(tmp_path / "tag"))
    assert "rank_00009_1-0123456789ab.safetensors" not in names(tmp_path / "tag")


KIB = 2**10
CHUNK = 64 * KIB


def large(data: torch.Tensor) -> Piece:
    of = LogicalTensor("w", "weight", tuple(data.shape), "float32")
    return Piece(of, Chunk.whole(of.shape), data)


@pytest.mark.parametrize(
    ("data", "most"),
    [
        (torch.zeros(512, 512), 0),
        (torch.zeros(512, 512).t(), CHUNK),
        (torch.zeros(1024, 1024)[::2, ::2], CHUNK),
        (torch.zeros(512, 512, dtype=torch.float64), CHUNK),
    ],
    ids=["contiguous", "transposed", "strided", "another dtype"],
)
def test_memory_for_saving_and_loading_is_at_most_a_chunk(tmp_path, data, most):
    engine = ShardedCheckpoint(ShardedConfig(writers=1, chunk_bytes=CHUNK), None)
    with LiveStorage() as live:
        engine.save(tmp_path, "tag", Snapshot([large(data)], {}, {}), latest=True)
    assert live.peak_bytes <= most
    with engine.open(tmp_path, "tag") as reader, LiveStorage() as live:
        reader.read([large(data)])
    assert live.peak_bytes <= most


@pytest.mark.parametrize("section", ["sharded", "async"])
def test_a_manifest_that_is_too_large_says_what_makes_it_so(tmp_path, monkeypatch, section):
    monkeypatch.setattr("ds_ckpt.sharded.MAX_JSON_BYTES", 3000)
    engine = ShardedCheckpoint(ShardedConfig(chunk_bytes=64), None, section=section)
    with pytest.raises(DsError, match="the manifest would have") as caught:
        engine.save(tmp_path, "tag", Snapshot([large(torch.zeros(64, 16))], {}, {}), latest=True)
    assert f"checkpoint.{section}.chunk_bytes" in caught.value.fix
    with pytest.raises(DsError, match="the manifest would have") as caught:
        engine.save(tmp_path, "tag", Snapshot([], {"client_state": "x" * 4000}, {}), latest=True)
    assert "client_state" in caught.value.fix
    assert "chunk_bytes" not in caught.value.fix


def test_options_are_checked_with_the_configuration():
    for options, expected in (({"writers": 0}, "writers"), ({"shards": 2}, "shards")):
        config = {"train_batch_size": 1, "checkpoint": {"engine": "sharded", "sharded": options}}
        with pytest.raises(DsError, match=expected):
            ds_core.initialize(model=torch.nn.Linear(1, 1), config=config)


def test_what_a_configuration_says_arrives(tmp_path):
    config = {"train_batch_size": 1, "checkpoint": {"engine": "sharded", "sharded": {"writers": 3, "chunk_bytes": 64}}}
    engine, *_ = ds_core.initialize(model=torch.nn.Linear(10, 10), config=config)
    engine.save_checkpoint(tmp_path, tag="tag")
    stored = read(tmp_path / "tag")
    assert len(stored.files) == 3
    assert max(chunk.nbytes for tensor in stored.tensors.values() for chunk in tensor.chunks) <= 64


@pytest.mark.parametrize("what", ["name", "kind"])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, what):
    engine = ShardedCheckpoint(None, None)
    engine.save(tmp_path, "tag", snapshot(1), latest=True)
    before = names(tmp_path / "tag")
    words = {"name": "w", "kind": "weight", what: "x" * 5000}
    of = LogicalTensor(shape=(2,), dtype="float32", **words)
    with pytest.raises(CheckpointError, match=rf"could not be loaded: tensors\[0\]\.{what}: .* 4096"):
        engine.save(tmp_path, "tag", Snapshot([Piece(of, Chunk.whole((2,)), torch.ones(2))], {}, {}), latest=True)
    assert names(tmp_path / "tag") == before
    check_content(engine, tmp_path, "tag", 1)
