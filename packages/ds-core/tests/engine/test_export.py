"""Weights of a running engine: files that others load, with ties, buffers, frozen weights and every dtype right."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, load_model

import ds_core
from ds_core.errors import CheckpointError, CommError
from ds_core.interfaces.logical import MASTER, WEIGHT, Chunk, Piece
from ds_core.partition.replicated import ReplicatedPartition
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.ranks import run_ranks

CONFIG: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}


class Model(torch.nn.Module):
    """Tied, frozen, a shared buffer, one that is not saved, one of integers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(11, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.frozen = torch.nn.Linear(6, 6).requires_grad_(False)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(3).bool())
        self.register_buffer("cache", torch.zeros(9), persistent=False)
        self.register_buffer("again", self.mask)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(self.norm(self.embed(tokens)))).logsumexp(-1).mean()


class WithExtraState(Model):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.loaded = state


def start(build=Model, **config: Any):
    engine = ds_core.initialize(model=build(), config={**CONFIG, **config})[0]
    for _ in range(2):
        engine.backward(engine(torch.tensor([1, 5])))
        engine.step()
    return engine


def expected_of(engine) -> dict[str, torch.Tensor]:
    """Return what a file of safetensors holds: each weight once."""
    found = engine.module_state_dict()
    return {name: value for name, value in found.items() if name not in ("head.weight", "again", "_extra_state")}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def test_export_weights(tmp_path):
    engine = start()
    done = engine.export_weights(tmp_path / "out")
    assert (done.files, done.index) == (("model.safetensors",), None)
    assert done.shared == {"again": "mask", "head.weight": "embed.weight"}
    path = tmp_path / "out" / "model.safetensors"
    same(load_file(path), expected_of(engine))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "again": "mask", "head.weight": "embed.weight"}
    model = Model()
    assert load_model(model, path) == (set(), [])
    same(model.state_dict(), engine.module.state_dict())


def test_dtypes_and_shards(tmp_path):
    engine = start()
    done = engine.export_weights(tmp_path, dtype=torch.bfloat16, max_shard_size=100)
    assert done.index is not None
    found = {name: value for file in done.files for name, value in load_file(tmp_path / file).items()}
    same(
        found,
        {n: v.bfloat16() if v.is_floating_point() else v for n, v in expected_of(engine).items()},
    )
    engine.export_weights(tmp_path / "words", dtype="BF16", max_shard_size="none")
    same(load_file(tmp_path / "words" / "model.safetensors"), found)
    with pytest.raises(CheckpointError, match="cannot be exported as 'int8'"):
        engine.export_weights(tmp_path, dtype="int8")
    with pytest.raises(CheckpointError, match="the size of a shard is 'huge'"):
        engine.export_weights(tmp_path, max_shard_size="huge")


def test_frozen_weights_can_be_left_out(tmp_path):
    engine = start()
    engine.export_weights(tmp_path, exclude_frozen_parameters=True)
    assert not any(name.startswith("frozen") for name in load_file(tmp_path / "model.safetensors"))
    assert engine.save_16bit_model(tmp_path / "bin", exclude_frozen_parameters=True)
    assert not any(name.startswith("frozen") for name in torch.load(tmp_path / "bin" / "pytorch_model.bin"))


def test_bin_files_keep_ties_and_no_more_than_their_weights(tmp_path):
    engine = start()
    done = engine.export_weights(tmp_path, safe_serialization=False, max_shard_size=200)
    found: dict[str, torch.Tensor] = {}
    for name in done.files:
        content = torch.load(tmp_path / name, weights_only=True)
        assert (tmp_path / name).stat().st_size < sum(t.nbytes for t in content.values()) + 4000
        found.update(content)
    same(found, engine.module_state_dict())
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()


def test_values_that_become_infinite_are_told(tmp_path, caplog):
    engine = start()
    with torch.no_grad():
        engine.module.frozen.bias[2] = 1e5
    with caplog.at_level(logging.WARNING, "ds_core"):
        done = engine.export_weights(tmp_path, "float16")
    assert done.beyond == ("frozen.bias",)
    [record] = caplog.records
    assert "'frozen.bias', have values that float16 cannot hold" in record.getMessage()
    assert load_file(tmp_path / "model.safetensors")["frozen.bias"][2] == float("inf")


@pytest.mark.parametrize("call", ["save_16bit_model", "save_fp16_model"])
def test_save_16bit_model(call, tmp_path):
    engine = start(WithExtraState)
    assert getattr(engine, call)(tmp_path / "new") is True
    found = torch.load(tmp_path / "new" / "pytorch_model.bin", weights_only=True)
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
    model = WithExtraState()
    model.load_state_dict(found)
    assert model.loaded == {"calls": 3}
    found.pop("_extra_state")
    state = engine.module_state_dict()
    state.pop("_extra_state")
    same(found, state)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["pytorch_model.bin"]


def test_save_16bit_model_as_safetensors(tmp_path, caplog):
    engine = start(WithExtraState)
    with caplog.at_level(logging.WARNING, "ds_core"):
        assert engine.save_16bit_model(tmp_path, "mine.safetensors")
    same(load_file(tmp_path / "mine.safetensors"), expected_of(engine))
    assert "extra state of modules is not in a safetensors file" in caplog.text


def test_weights_that_transformers_would_rather_load_are_told(tmp_path, caplog):
    engine = start()
    engine.save_16bit_model(tmp_path)
    engine.save_16bit_model(tmp_path, "model.safetensors")
    assert caplog.text == ""
    engine.save_16bit_model(tmp_path)
    (record,) = caplog.records
    assert "transformers will load 'model.safetensors'" in record.getMessage()
    assert "not 'pytorch_model.bin', which was just written" in record.getMessage()


def test_complex_weights_are_for_bin_files(tmp_path):
    class Complex(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))

    engine = ds_core.initialize(model=Complex(), config={"train_batch_size": 1})[0]
    assert engine.save_16bit_model(tmp_path)
    assert torch.load(tmp_path / "pytorch_model.bin")["w"].dtype == torch.complex64
    with pytest.raises(CheckpointError, match=r"complex64 cannot be stored") as caught:
        engine.export_weights(tmp_path / "safe")
    assert caught.value.where == "tensor 'w'"
    assert list((tmp_path / "safe").iterdir()) == []


def test_compiled_models_have_plain_names(tmp_path):
    engine = ds_core.initialize(model=torch.compile(Model(), backend="eager"), config={"train_batch_size": 1})[0]
    engine.export_weights(tmp_path)
    assert "embed.weight" in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["_consolidated_16bit_state_dict", "_zero3_consolidated_16bit_state_dict"])
def test_whole_weights_need_no_consolidation(name):
    with pytest.raises(ValueError, match="whole on every rank at stage 0"):
        getattr(start(), name)()


def test_a_checkpoint_says_what_is_shared_and_frozen(tmp_path):
    engine = start()
    engine.save_checkpoint(tmp_path)
    with engine.parts.checkpoint.open(tmp_path, engine.parts.checkpoint.read_latest(tmp_path)) as reader:
        assert reader.state["shared"] == {"again": "mask", "head.weight": "embed.weight"}
        assert reader.state["frozen"] == ["frozen.bias", "frozen.weight"]


# -- several ranks ----------------------------------------------------------------------------------------------------


def shard(engine) -> None:
    """Give each rank an interval of every weight and nothing else, as a partition of ZeRO-3 does."""
    partition = engine.parts.partition
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def pieces() -> list[Piece]:
        found = []
        for piece in ReplicatedPartition.pieces(partition):
            if piece.of.kind not in (WEIGHT, MASTER):
                found.append(piece)
                continue
            each = -(-piece.of.numel // world_size)
            start, end = min(rank * each, piece.of.numel), min((rank + 1) * each, piece.of.numel)
            chunk = Chunk(piece.chunk.box, start, end - start)
            if chunk.length:
                found.append(Piece(piece.of, chunk, piece.data.detach().reshape(-1)[start:end].clone(), rank))
        return found

    partition.pieces = pieces
    engine.zero_optimization_stage = lambda: 3


def of_shards(folder: Path) -> None:
    engine = start()
    expected, whole = expected_of(engine), engine.module_state_dict()
    shard(engine)
    done = engine.export_weights(folder / "out", max_shard_size=120)
    assert len(done.files) > 2, "every rank knows what was written"
    dist.barrier()
    same({name: value for file in done.files for name, value in load_file(folder / "out" / file).items()}, expected)
    for name in ("_consolidated_16bit_state_dict", "_zero3_consolidated_16bit_state_dict"):
        found = getattr(engine, name)()
        if dist.get_rank():
            assert found is None
        else:
            same(found, whole)
            assert found["head.weight"] is found["embed.weight"]
        found = getattr(engine, name)(exclude_frozen_parameters=True)
        assert found is None or found.keys() == {name for name in whole if not name.startswith("frozen")}
    assert engine.save_16bit_model(folder)
    dist.barrier()
    same(torch.load(folder / "pytorch_model.bin", weights_only=True), whole)


def into_a_file(folder: Path) -> None:
    engine = start()
    shard(engine)
    if dist.get_rank() == 0:
        folder.mkdir()
        (folder / "out").write_text("not a folder")
    dist.barrier()
    told = "" if dist.get_rank() == 0 else "rank 0 failed: "
    with pytest.raises(CheckpointError, match=f"^{told}the weights cannot be written: File exists"):
        engine.export_weights(folder / "out")


def other_arguments(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="ranks pass different arguments: rank 1"):
        start().export_weights(folder, dtype="float32" if dist.get_rank() else None)
    assert not folder.exists()


def arguments_that_one_rank_cannot_use(folder: Path) -> list[str]:
    """Those of rank 1; all are told at once."""
    engine, rank = start(), dist.get_rank()
    found = []
    for act, options in (
        (engine.export_weights, {"dtype": "int8"}),
        (engine.export_weights, {"max_shard_size": "huge"}),
        (engine.export_weights, {"save_dir": "s3://bucket/out"}),
        (engine.save_16bit_model, {"save_dir": 5}),
        (engine.save_16bit_model, {"save_filename": 5}),
    ):
        with pytest.raises(CheckpointError) as caught:
            act(**{"save_dir": folder, **(options if rank else {})})
        found.append(caught.value.what.removeprefix("rank 1 failed: "))
    pieces = engine.parts.partition.pieces

    def broken() -> list[Piece]:
        if rank:
            raise ZeroDivisionError("no pieces")
        return pieces()

    engine.parts.partition.pieces = broken
    with pytest.raises(ZeroDivisionError if rank else CommError, match="no pieces"):
        engine.export_weights(folder)
    assert not folder.exists()
    return found


def test_what_one_rank_cannot_use_is_told_to_all(tmp_path):
    [(first, second)] = run_ranks([partial(arguments_that_one_rank_cannot_use, tmp_path / "out")], 2, timeout_s=20)
    assert first == second
    for said, expected in zip(
        first,
        (
            "exported as 'int8'",
            "the size of a shard is 'huge'",
            "no URL such as s3://",
            "5 is no path",
            "5 cannot name",
        ),
        strict=True,
    ):
        assert expected in said


@pytest.mark.parametrize("place", ["s3://bucket/out", Path("s3://bucket/out"), ""])
def test_exports_go_to_paths_of_this_machine(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = start()
    for act in (engine.export_weights, engine.save_16bit_model):
        with pytest.raises(CheckpointError, match=r"no URL such as s3://|lost one of its slashes|no path was given"):
            act(place)
    assert not list(tmp_path.iterdir())


def test_weights_that_no_rank_has_whole(tmp_path):
    cases = [partial(case, tmp_path / case.__name__) for case in (of_shards, into_a_file, other_arguments)]
    run_ranks(cases, 2, timeout_s=40)


def test_stage_3_gathers_where_it_was_asked_to(tmp_path, caplog, monkeypatch):
    engine = start()
    zero = engine._config.zero_optimization
    for gathers in (False, True):
        section = zero.model_copy(update={"stage": 3, "gather_16bit_weights_on_model_save": gathers})
        monkeypatch.setattr(engine, "_config", SimpleNamespace(zero_optimization=section))
        with caplog.at_level(logging.INFO, "ds_core"):
            assert engine.save_16bit_model(tmp_path) is gathers
        assert (tmp_path / "pytorch_model.bin").exists() is gathers
    assert "stage3_gather_16bit_weights_on_model_save" in caplog.text
