"""``ds_ckpt.open``: any checkpoint, without an engine; and which one is meant."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from typing import TYPE_CHECKING

import pytest
import torch

import ds_ckpt
from ds_ckpt import manifest
from ds_ckpt.config import ShardedConfig
from ds_ckpt.sharded import ShardedCheckpoint
from ds_ckpt.tags import find_tags, folder_of
from ds_core.checkpoint.jsonable import encode
from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Chunk, LogicalTensor, Piece, Snapshot

if TYPE_CHECKING:
    from pathlib import Path

CLIENT = {"a": (1, 2), 3: OrderedDict(x=float("inf")), "t": torch.arange(3)}


def piece(name: str, kind: str, data: torch.Tensor, rank: int | None = None) -> Piece:
    of = LogicalTensor(name, kind, tuple(data.shape), str(data.dtype).removeprefix("torch."), rank)
    return Piece(of, Chunk.whole(of.shape), data)


TENSORS = [
    piece("b.weight", "weight", torch.arange(6.0).view(2, 3).bfloat16()),
    piece("b.weight", "master", torch.arange(6.0).view(2, 3) + 0.001),
    piece("b.weight", "exp_avg", torch.full((2, 3), 3.0)),
    piece("b.weight", "step", torch.tensor(7.0)),
    piece("a.bias", "weight", torch.ones(4).half()),
    piece("only_master", "master", torch.ones(2)),
    piece("norm.mean", "buffer", torch.tensor([1, 2])),
    piece("a.bias", "gradient", torch.full((4,), 5.0), rank=0),
    piece("empty", "weight", torch.zeros(0, 3)),
]


def save(directory: Path, tag: str, engine: str = "sharded", *, latest: bool = True, step: int = 3) -> None:
    state = {"global_steps": step, "client_state": encode(CLIENT, "client_state")}
    chosen = {
        "sharded": lambda: ShardedCheckpoint(ShardedConfig(writers=2, chunk_bytes=16), None),
        "plain": lambda: PlainCheckpoint(None, None),
    }[engine]()
    chosen.save(directory, tag, Snapshot(TENSORS, state, {}), latest=latest)


@pytest.fixture(params=["sharded", "plain"])
def opened(request, tmp_path):
    save(tmp_path, "tag", request.param)
    with ds_ckpt.open(tmp_path) as checkpoint:
        yield checkpoint


def test_names_and_kinds(opened):
    assert sorted(opened.names()) == sorted(["b.weight", "a.bias", "only_master", "norm.mean", "empty"])
    assert sorted(opened.kinds("b.weight")) == ["exp_avg", "master", "step", "weight"]
    assert opened.kinds("norm.mean") == ["buffer"]


def test_names_come_in_the_order_of_the_model(tmp_path):
    save(tmp_path, "tag")
    assert ds_ckpt.open(tmp_path).names() == ["b.weight", "a.bias", "only_master", "norm.mean", "empty"]


def test_every_tensor_has_its_bits_and_its_dtype(opened):
    for each in TENSORS:
        found = opened.tensor(each.of.name, each.of.kind, rank=each.of.rank)
        assert found.dtype == each.data.dtype
        assert torch.equal(found, each.data)


def test_a_master_and_a_weight_stand_for_each_other(opened):
    assert opened.tensor("b.weight").dtype == torch.float32
    assert torch.equal(opened.tensor("a.bias"), torch.ones(4).half())
    assert torch.equal(opened.tensor("only_master", "weight"), torch.ones(2))
    assert torch.equal(opened.tensor("norm.mean"), torch.tensor([1, 2]))
    with pytest.raises(CheckpointError, match="has no 'buffer'"):
        opened.tensor("a.bias", "buffer")


def test_a_tensor_is_a_new_one_each_time(opened):
    opened.tensor("only_master").zero_()
    assert torch.equal(opened.tensor("only_master"), torch.ones(2))


def test_state(opened):
    assert opened.state["global_steps"] == 3
    found = opened.client_state
    assert (found["a"], found[3]) == ((1, 2), OrderedDict(x=float("inf")))
    assert torch.equal(found["t"], torch.arange(3))
    assert opened.world_size == 1
    assert opened.path.name == "tag"


def test_what_is_not_there_names_what_is(opened):
    with pytest.raises(CheckpointError) as caught:
        opened.tensor("b.weigth")
    assert "'b.weight'" in caught.value.fix
    with pytest.raises(CheckpointError) as caught:
        opened.tensor("a.bias", "exp_avg")
    assert "gradient" in caught.value.fix
    assert "weight" in caught.value.fix
    for rank in (None, 4):
        with pytest.raises(CheckpointError) as caught:
            opened.tensor("a.bias", "gradient", rank=rank)
        assert "rank=, one of 0" in caught.value.fix


def test_no_torch_before_the_first_tensor(tmp_path):
    save(tmp_path, "tag")
    code = (
        f"import sys, ds_ckpt; checkpoint = ds_ckpt.open({str(tmp_path)!r}); checkpoint.names(); "
        "checkpoint.kinds('a.bias'); checkpoint.stored.state; assert 'torch' not in sys.modules; "
        "assert checkpoint.tensor('a.bias').tolist() == [1, 1, 1, 1]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    save(tmp_path, "tag")
    for path in (tmp_path / "tag").glob("*.safetensors"):
        path.write_bytes(b"\xff" * path.stat().st_size)
    with ds_ckpt.open(tmp_path) as checkpoint:
        assert len(checkpoint.names()) == 5
        with pytest.raises(CheckpointError, match="not what was written"):
            checkpoint.tensor("b.weight")


HOSTILE = [
    {"$ds": "unknown"},
    {"$ds": "tensor", "dtype": "load", "shape": [1], "value": "AAAA"},
    {"$ds": "tensor", "dtype": "float32", "shape": [10**12], "value": "AAAA"},
    {"$ds": "tensor", "dtype": "nothing", "shape": [1], "value": "AAAA"},
    {"$ds": "tuple"},
    {"$ds": "dict", "value": [[[], 1]]},
    {"$ds": "dict", "value": 5},
    {"$ds": "float", "value": "x"},
]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_state_is_refused(tmp_path, value):
    save(tmp_path, "tag")
    path = tmp_path / "tag" / "checkpoint.json"
    content = json.loads(path.read_bytes())
    content["state"]["client_state"] = value
    body = (json.dumps({k: v for k, v in content.items() if k not in ("format", "version", "checksum")})[1:]).encode()
    path.write_bytes(manifest._head(body) + body)
    with ds_ckpt.open(tmp_path) as checkpoint, pytest.raises(CheckpointError):
        checkpoint.client_state  # noqa: B018


def test_a_tensor_that_fits_nowhere_is_refused(tmp_path):
    """Its file has holes, so that it takes no room on the disk."""
    save(tmp_path, "tag")
    path = tmp_path / "tag" / "checkpoint.json"
    content = json.loads(path.read_bytes())
    name = next(iter(content["files"]))
    with (tmp_path / "tag" / name).open("r+b") as file:
        file.truncate(2**42)
    content["files"] = {name: {**content["files"][name], "bytes": 2**42}}
    row = [0, 512, 2**41, "xxh3:" + "0" * 32, None, None, 0, 2**39]
    huge = {"name": "huge", "kind": "weight", "rank": None, "shape": [2**39], "dtype": "float32", "chunks": [row]}
    content["tensors"] = [huge]
    body = (json.dumps({k: v for k, v in content.items() if k not in ("format", "version", "checksum")})[1:]).encode()
    path.write_bytes(manifest._head(body) + body)
    code = (
        "import resource, ds_ckpt; from ds_core.errors import CheckpointError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))\n"
        f"checkpoint = ds_ckpt.open({str(tmp_path)!r})\n"
        "try:\n    checkpoint.tensor('huge')\n"
        "except CheckpointError as error:\n    assert 'does not fit' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- which one --------------------------------------------------------------------------------------------------------


def test_latest_a_tag_and_the_folder_of_a_tag(tmp_path):
    save(tmp_path, "one", step=1)
    save(tmp_path, "two", "plain", step=2, latest=False)
    assert ds_ckpt.open(tmp_path).state["global_steps"] == 1
    assert ds_ckpt.open(str(tmp_path), "two").state["global_steps"] == 2
    assert ds_ckpt.open(tmp_path / "two").state["global_steps"] == 2


def test_without_latest_the_tags_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no file 'latest'") as caught:
        ds_ckpt.open(tmp_path)
    assert "no checkpoint is in it" in caught.value.fix
    save(tmp_path, "one", latest=False)
    (tmp_path / "of_deepspeed").mkdir()
    (tmp_path / "of_deepspeed" / "mp_rank_00_model_states.pt").write_text("")
    with pytest.raises(CheckpointError) as caught:
        ds_ckpt.open(tmp_path)
    assert "one" in caught.value.fix
    assert "of_deepspeed" in caught.value.fix


def test_wrong_paths(tmp_path):
    (tmp_path / "file").write_text("")
    for path, what in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "file", "no folder")):
        with pytest.raises(CheckpointError, match=what):
            ds_ckpt.open(path)
    for tag in ("../x", "", "latest"):
        with pytest.raises(CheckpointError, match="cannot name"):
            ds_ckpt.open(tmp_path, tag)


def test_the_latest_universal_folder_is_found(tmp_path):
    (tmp_path / "latest_universal").write_text("step_universal\n")
    assert folder_of(tmp_path, None).path == tmp_path / "step_universal"


def test_tags_are_listed_with_what_is_wrong(tmp_path):
    import os

    save(tmp_path, "old", latest=False)
    save(tmp_path, "new")
    save(tmp_path, "damaged", latest=False)
    for age, tag in enumerate(("old", "new", "damaged")):
        os.utime(tmp_path / tag / "checkpoint.json", (age, age))
    with (tmp_path / "damaged" / "checkpoint.json").open("ab") as file:
        file.write(b"x")
    os.utime(tmp_path / "damaged" / "checkpoint.json", (2, 2))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "rank_00000_0-0123456789ab.safetensors").write_text("x")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "events").write_text("x")
    tags = find_tags(tmp_path)
    assert [(tag.name, tag.is_latest, tag.stored is not None) for tag in tags] == [
        ("old", False, True),
        ("new", True, True),
        ("damaged", False, False),
        ("torn", False, False),
    ]
    assert "damaged" in tags[2].problem
    assert "not complete" in tags[3].problem


def test_a_folder_that_cannot_be_read_hides_no_other(tmp_path, monkeypatch):
    import os

    save(tmp_path, "good")
    save(tmp_path, "locked", latest=False)
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(tmp_path / "locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = {tag.name: tag for tag in find_tags(tmp_path)}
    assert found["good"].stored is not None
    assert found["locked"].problem == "it cannot be told what is there: Permission denied"


def deepspeed(folder):
    folder.mkdir(parents=True)
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"")


def test_tags_of_deepspeed_are_offered_as_ours_are(tmp_path):
    deepspeed(tmp_path / "theirs")
    (tmp_path / "latest").write_text("theirs")
    with pytest.raises(CheckpointError, match="there is no checkpoint 'zz'") as caught:
        ds_ckpt.open(tmp_path, "zz")
    assert caught.value.fix == "complete checkpoints there: theirs"
    engine = ShardedCheckpoint(None, None)
    with pytest.raises(CheckpointError, match="there is no checkpoint 'zz'") as caught:
        engine.open(tmp_path, "zz")
    assert caught.value.fix == "complete checkpoints there: theirs"
    (tmp_path / "latest").unlink()
    with pytest.raises(CheckpointError, match="no file 'latest'") as caught:
        engine.read_latest(tmp_path)
    assert caught.value.fix == "pass tag=, one of theirs"


def test_errors_of_deepspeed_s_files_say_which_checkpoint(tmp_path):
    deepspeed(tmp_path / "theirs")
    path = tmp_path / "theirs" / "mp_rank_00_model_states.pt"
    for data, where in ((b"", str(path)), (b"\x80\x02}q\x00X", f"{path}, byte ")):
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            ds_ckpt.open(tmp_path, "theirs")
        assert caught.value.where.startswith(where)
    [tag] = find_tags(tmp_path)
    assert tag.problem.startswith("mp_rank_00_model_states.pt, byte ")


def test_where_a_save_was_killed_it_is_said(tmp_path):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "rank_00000_0-0123456789ab.safetensors").write_text("x")
    fix = "the save of 'torn' did not end: save again, or remove that folder"
    for find in (lambda: ds_ckpt.open(tmp_path), lambda: ShardedCheckpoint(None, None).read_latest(tmp_path)):
        with pytest.raises(CheckpointError, match="no file 'latest'") as caught:
            find()
        assert caught.value.fix == fix
    with pytest.raises(CheckpointError, match=r"is not complete: .* the save of it did not end") as caught:
        ds_ckpt.open(tmp_path, "torn")
    assert caught.value.fix == fix
    save(tmp_path, "whole", latest=False)
    with pytest.raises(CheckpointError) as caught:
        ds_ckpt.open(tmp_path)
    assert caught.value.fix == "pass tag=, one of whole"


def test_other_json_is_no_manifest(tmp_path):
    (tmp_path / "checkpoint.json").write_text('{"a": 1}')
    with pytest.raises(CheckpointError, match=r"a checkpoint\.json that is not a checkpoint's"):
        ds_ckpt.open(tmp_path)


def test_every_name_of_a_tied_weight_is_known(tmp_path):
    snapshot = Snapshot(TENSORS, {"shared": {"head.weight": "b.weight"}}, {})
    ShardedCheckpoint(None, None).save(tmp_path, "tag", snapshot, latest=True)
    with ds_ckpt.open(tmp_path) as checkpoint:
        assert "head.weight" not in checkpoint.names()
        assert checkpoint.kinds("head.weight") == checkpoint.kinds("b.weight")
        assert torch.equal(checkpoint.tensor("head.weight"), checkpoint.tensor("b.weight"))
        assert torch.equal(checkpoint.tensor("head.weight", "exp_avg"), torch.full((2, 3), 3.0))


def test_what_it_is_fits_into_a_line(opened):
    assert len(repr(opened.stored)) < 80 + len(str(opened.path))
    assert "9 tensors" in repr(opened.stored)
