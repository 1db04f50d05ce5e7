"""Checkpoints that DeepSpeed 0.19.6 wrote give exactly the tensors and the state that it had."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from ds_ckpt import formats
from ds_ckpt.formats.deepspeed import is_deepspeed, read_deepspeed
from ds_ckpt.loading import StoredReader
from ds_ckpt.sharded import ShardedCheckpoint
from ds_core.checkpoint.jsonable import decode
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Chunk, Piece, Snapshot

if TYPE_CHECKING:
    from ds_ckpt.stored import Stored

FIXTURES = Path(__file__).parent / "deepspeed-0.19.6"
CASES = sorted(path.parent for path in FIXTURES.glob("*/expected.json"))
TAG = "global_step4"


def read_all(stored: Stored) -> dict[tuple[str, str], torch.Tensor]:
    """Return every tensor by (name, kind)."""
    with StoredReader(stored) as reader:
        pieces = [
            Piece(of, Chunk.whole(of.shape), torch.empty(of.shape, dtype=getattr(torch, of.dtype)))
            for of in reader.tensors()
        ]
        reader.read(pieces)
    return {(piece.of.name, piece.of.kind): piece.data for piece in pieces}


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_there_are_fixtures_of_every_stage() -> None:
    assert {json.loads((case / "expected.json").read_text())["stage"] for case in CASES} == {0, 1, 2, 3}


def test_tensors_are_those_deepspeed_had(case: Path) -> None:
    found = read_all(formats.read(case / TAG))
    expected = load_file(case / "expected.safetensors")
    for key, value in expected.items():
        name, kind = key.split("|")
        # In fp32 without ZeRO the weight is its own master.
        kind = {"fp32": "master" if (name, "master") in found else "weight"}.get(kind, kind)
        assert found[name, kind].dtype == torch.float32
        assert torch.equal(found[name, kind], value), key
    params = {key.split("|")[0] for key in expected if key.endswith("|fp32")}
    known = {(name, kind) for name in params for kind in ("master", "weight", "exp_avg", "exp_avg_sq", "step")}
    assert set(found) <= known | {(key.split("|")[0], "buffer") for key in expected if key.endswith("|buffer")}
    for name in params:
        assert found[name, "step"].item() == 4


def test_weights_are_the_masters_in_the_dtype_of_the_model(case: Path) -> None:
    found = read_all(read_deepspeed(case / TAG))
    about = json.loads((case / "expected.json").read_text())
    weights = {name: value for (name, kind), value in found.items() if kind == "weight"}
    assert bool(weights) == (about["stage"] < 3)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[about["dtype"]]
    for name, value in weights.items():
        assert value.dtype == dtype
        if (name, "master") in found:
            assert torch.equal(found[name, "master"].to(dtype), value)


def test_state_is_what_deepspeed_had(case: Path) -> None:
    stored = read_deepspeed(case / TAG)
    about = json.loads((case / "expected.json").read_text())
    state: Any = stored.state
    assert json.loads(json.dumps(state)) == state
    assert (stored.format, stored.version, stored.world_size) == ("deepspeed", about["deepspeed"], about["world"])
    assert stored.rank_states == ()
    assert (state["stage"], state["global_steps"], state["skipped_steps"]) == (about["stage"], about["global_steps"], 0)
    assert state["global_samples"] == 4 * 4 * about["world"]
    assert (state["accumulation"], state["micro_steps"], state["in_window"]) == (1, 4, 0)
    assert decode(state["client_state"]) == {"epoch": 2, "note": "fixture", "ds_version": about["deepspeed"]}
    assert decode(state["schedule"]) == {"last_batch_iteration": 3}
    (group,) = state["optimizer"]["groups"]
    options = {key: decode(value) for key, value in group["options"].items()}
    assert [options["lr"]] == about["lr_after"]
    assert options["betas"] == tuple(about["config"]["optimizer"]["params"]["betas"])
    names = {key.split("|")[0] for key in load_file(case / "expected.safetensors") if key.endswith("|fp32")}
    assert set(group["names"]) == names
    assert state["precision"] == {"fp32": "Fp32", "bf16": "Bf16"}[about["dtype"]]
    assert state["loss_scale"] == 1.0


def test_chunks_lie_inside_the_files_that_are_listed(case: Path) -> None:
    stored = read_deepspeed(case / TAG)
    sizes = {path.name: path.stat().st_size for path in (case / TAG).iterdir()}
    assert {file.name: file.nbytes for file in stored.files.values()}.items() <= sizes.items()
    for tensor in stored.tensors.values():
        assert all(0 < chunk.offset <= sizes[chunk.file] - chunk.nbytes for chunk in tensor.chunks)
        assert all(chunk.file in stored.files for chunk in tensor.chunks)


def test_reading_loads_no_torch_and_no_pickle_of_it() -> None:
    script = (
        "import sys, pathlib; from ds_ckpt import formats\n"
        f"formats.read(pathlib.Path({str(CASES[0] / TAG)!r}))\n"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", "missing is that of rank 1"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "missing is that of rank 0"),
        ("mp_rank_00_model_states.pt", "missing: mp_rank_00_model_states.pt"),
    ],
)
def test_a_missing_file_is_named(missing: str, named: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURES / "plain-stage2-world2-fp32" / TAG, tmp_path / "tag")
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=named):
        read_deepspeed(folder)


def test_a_file_of_an_earlier_save_with_more_ranks_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURES / "plain-stage2-world2-fp32" / TAG, tmp_path / "tag")
    name = "zero_pp_rank_10_mp_rank_00_optim_states.pt"
    shutil.copy(folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt", folder / name)
    with pytest.raises(CheckpointError, match=f"{name} was left by an earlier save"):
        read_deepspeed(folder)


def test_folders_are_told_apart(tmp_path: Path) -> None:
    assert all(is_deepspeed(case / TAG) for case in CASES)
    (tmp_path / "rank_00000-0123456789ab.safetensors").touch()
    assert not is_deepspeed(tmp_path)


def test_saving_over_one_leaves_its_files_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(CASES[0], tmp_path / "run")
    before = {path.name for path in (tmp_path / "run" / TAG).iterdir()}
    ShardedCheckpoint(None, None).save(tmp_path / "run", TAG, Snapshot([], {}, {}), latest=True)
    assert before < {path.name for path in (tmp_path / "run" / TAG).iterdir()}
    (record,) = caplog.records
    assert "files that DeepSpeed wrote are left beside the new checkpoint" in record.getMessage()
