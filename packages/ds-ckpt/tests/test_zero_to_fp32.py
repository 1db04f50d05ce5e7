"""DeepSpeed's functions by its signatures, over checkpoints of its own and of ours."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ds_ckpt
import ds_core
from ds_ckpt.zero_to_fp32 import (
    LazyTensor,
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
    main,
)
from ds_core.errors import CheckpointError
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here

FIXTURES = Path(__file__).parent / "deepspeed-0.19.6"
CASES = sorted(path.parent for path in FIXTURES.glob("*/expected.json"))
TAG = "global_step4"


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(11, 6)
        self.frozen = torch.nn.Linear(6, 6).requires_grad_(False)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(7))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(self.embed(tokens))).logsumexp(-1).mean()


@pytest.fixture
def saved(tmp_path) -> tuple[Model, Path]:
    config = {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    engine = ds_core.initialize(model=Model(), config=config)[0]
    engine.backward(engine(torch.tensor([1, 5])))
    engine.step()
    engine.save_checkpoint(tmp_path / "checkpoints", tag="here")
    return engine.module, tmp_path / "checkpoints"


def expected_of(case: Path) -> dict[str, torch.Tensor]:
    values = load_file(case / "expected.safetensors")
    return {key.split("|")[0]: value for key, value in values.items() if key.endswith(("|fp32", "|buffer"))}


def test_signatures_are_those_of_deepspeed():
    for function, names in (
        (get_fp32_state_dict_from_zero_checkpoint, "checkpoint_dir tag exclude_frozen_parameters lazy_mode"),
        (
            convert_zero_checkpoint_to_fp32_state_dict,
            "checkpoint_dir output_dir max_shard_size safe_serialization tag exclude_frozen_parameters",
        ),
        (load_state_dict_from_zero_checkpoint, "model checkpoint_dir tag"),
    ):
        assert list(inspect.signature(function).parameters) == names.split()
        assert getattr(ds_ckpt, function.__name__) is function


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fixtures_of_deepspeed(case, tmp_path):
    expected = expected_of(case)
    whole = get_fp32_state_dict_from_zero_checkpoint(case, TAG)
    lazy = get_fp32_state_dict_from_zero_checkpoint(case, TAG, lazy_mode=True)
    assert whole.keys() == lazy.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(whole[name], value)
        assert isinstance(lazy[name], LazyTensor)
        assert (lazy[name].shape, lazy[name].dtype, lazy[name].numel()) == (value.shape, value.dtype, value.numel())
        assert torch.equal(lazy[name].contiguous(), value)
    convert_zero_checkpoint_to_fp32_state_dict(case, tmp_path, tag=TAG)
    found = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    convert_zero_checkpoint_to_fp32_state_dict(case, tmp_path / "safe", safe_serialization=True, tag=TAG)
    assert load_file(tmp_path / "safe" / "model.safetensors").keys() == expected.keys()


def test_ours(saved):
    model, folder = saved
    found = get_fp32_state_dict_from_zero_checkpoint(folder)
    state = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert found["count"].dtype == torch.int64
    assert found["head.weight"] is found["embed.weight"]
    lazy = get_fp32_state_dict_from_zero_checkpoint(folder, "here", lazy_mode=True)
    assert lazy["head.weight"] is lazy["embed.weight"]
    assert repr(lazy["embed.weight"]) == "<LazyTensor 'embed.weight' [11, 6] torch.float32>"
    left = get_fp32_state_dict_from_zero_checkpoint(folder, exclude_frozen_parameters=True)
    assert left.keys() == {"embed.weight", "head.weight", "count"}


def test_a_model_is_filled(saved, caplog):
    trained, folder = saved
    model = Model()
    with torch.no_grad():
        model.embed.weight.zero_()
    with caplog.at_level(logging.WARNING, "ds_core"):
        assert load_state_dict_from_zero_checkpoint(model, folder) is model
    assert caplog.text == ""
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.head.weight is model.embed.weight


def test_what_does_not_fit_is_told(saved, caplog):
    _, folder = saved
    other = torch.nn.ModuleDict({"embed": torch.nn.Embedding(11, 6), "other": torch.nn.Linear(1, 1)})
    with caplog.at_level(logging.WARNING, "ds_core"):
        load_state_dict_from_zero_checkpoint(other, folder)
    assert "2 tensors, such as 'other.weight', are only in the model" in caplog.text
    assert "4 tensors, such as 'frozen.weight', are only in the checkpoint" in caplog.text


def test_a_missing_checkpoint_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="no file 'latest'"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="there is no checkpoint 'step'"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path, "step")


def test_the_script_takes_deepspeeds_arguments(saved, tmp_path, capsys):
    trained, folder = saved
    assert main([str(folder), str(tmp_path / "bin")]) == 0
    assert f"{tmp_path / 'bin'}: pytorch_model.bin" in capsys.readouterr().out
    found = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(found["embed.weight"], trained.embed.weight)
    assert "frozen.weight" in found
    options = ["--safe_serialization", "--exclude_frozen_parameters", "--max_shard_size", "200B"]
    assert main([str(folder), str(tmp_path / "st"), "-t", "here", *options]) == 0
    assert "frozen.weight" not in (tmp_path / "st" / "model.safetensors.index.json").read_text()


def test_the_script_runs_as_a_module_and_fails_with_a_reason(tmp_path):
    command = [sys.executable, "-m", "ds_ckpt.zero_to_fp32", str(tmp_path), str(tmp_path / "out"), "--tag", "step"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("there is no checkpoint 'step'\n  where: ")
    assert not (tmp_path / "out").exists()
