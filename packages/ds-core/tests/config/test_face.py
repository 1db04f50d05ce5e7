"""DeepSpeedConfig: DeepSpeed's names for a checked configuration; and the writer of files."""

from __future__ import annotations

import copy
import json
import logging
import pathlib
import pickle
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import ds_core
from ds_core.config import ConfigError, DeepSpeedConfig, DeepSpeedConfigError, DeepSpeedConfigWriter
from ds_core.config.catalog import all_sections
from ds_core.config.config import Config
from ds_core.config.face import data_parallel_world_size

if TYPE_CHECKING:
    from pathlib import Path

GIVEN = {
    "train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 7},
    "fp16": {"enabled": True},
    "optimizer": {"type": "Adam", "params": {"lr": 1}},
    "checkpoint": {"tag_validation": "fail"},
    "activation_checkpointing": {"profile": False},
}


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes torch.distributed say it has this many ranks."""

    def say(count: int, rank: int = 0) -> None:
        initialised = SimpleNamespace(
            is_available=lambda: True,
            is_initialized=lambda: True,
            get_world_size=lambda: count,
            get_rank=lambda: rank,
        )
        monkeypatch.setitem(sys.modules, "torch.distributed", initialised)

    return say


def test_attributes() -> None:
    config = DeepSpeedConfig(GIVEN)
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (
        8,
        4,
        2,
    )
    assert (config.zero_enabled, config.zero_optimization_stage, config.zero_config.reduce_bucket_size) == (True, 2, 7)
    assert (config.float16_config.enabled, config.bfloat16_config.enabled) == (True, False)
    assert (config.gradient_clipping, config.steps_per_print) == (1.0, None)
    assert (config.optimizer_name, config.optimizer_params, config.optimizer_legacy_fusion) == (
        "Adam",
        {"lr": 1},
        False,
    )
    assert (config.scheduler_name, config.scheduler_params) == (None, None)
    assert config.checkpoint_config.tag_validation == config.checkpoint.tag_validation == "Fail"
    assert config.activation_checkpointing_config is config.activation_checkpointing
    assert config.aio_config.block_size == 1048576
    assert (config.global_rank, config.world_size) == (0, 1)
    without = DeepSpeedConfig({"train_batch_size": 1, "scheduler": None})
    assert (without.zero_enabled, without.optimizer_name, without.optimizer_params) == (False, None, None)
    assert without.optimizer_legacy_fusion is False


def test_every_key_is_an_attribute() -> None:
    config = DeepSpeedConfig(GIVEN)
    for name in Config.model_fields:
        assert getattr(config, name) == getattr(config.config, name)
    for name, section in all_sections().items():
        assert isinstance(getattr(config, name), section) or name == "scheduler", name
        assert getattr(config, f"{name}_config") == getattr(config, name)


def test_monitor_config() -> None:
    off = DeepSpeedConfig(GIVEN).monitor_config
    assert off.enabled is False
    assert {type(section).__name__ for section in vars(off).values()} == {
        *("TensorboardSection", "WandbSection", "CsvMonitorSection", "CometSection")
    }
    assert DeepSpeedConfig({**GIVEN, "csv_monitor": {"enabled": True}}).monitor_config.enabled is True


@pytest.mark.parametrize("name", ["zork", "zork_config", "model_fields", "options", "_raw"])
def test_no_such_attribute(name: str) -> None:
    with pytest.raises(AttributeError, match=f"'DeepSpeedConfig' object has no attribute '{name}'"):
        getattr(DeepSpeedConfig(GIVEN), name)


def test_can_be_copied() -> None:
    config = DeepSpeedConfig(GIVEN)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert (other.train_batch_size, other.zero_config) == (8, config.zero_config)


def test_print_logs_every_attribute_and_the_json(caplog: pytest.LogCaptureFixture) -> None:
    group = object()
    config = DeepSpeedConfig({**GIVEN, "scheduler": {"type": "LambdaLR", "params": {"lr_lambda": group}}})
    with caplog.at_level(logging.INFO, "ds_core"):
        config.print("my config")
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    text, _, raw = record.getMessage().partition("\n  json = ")
    heading, *lines = text.split("\n")
    assert heading == "my config:"
    found = dict(line.split(maxsplit=1) for line in lines)
    assert found["train_micro_batch_size_per_gpu"] == "4"
    assert found["zero_config"] == repr(config.zero_config)
    assert found["optimizer_params"] == "{'lr': 1}"
    assert found.keys() >= {"float16_config", "gradient_clipping", "monitor_config", "activation_checkpointing_config"}
    assert set(found) <= set(dir(config))
    assert json.loads(raw) == {**GIVEN, "scheduler": {"type": "LambdaLR", "params": {"lr_lambda": str(group)}}}


def test_print_shows_no_secrets(caplog: pytest.LogCaptureFixture) -> None:
    config = DeepSpeedConfig({**GIVEN, "comet": {"api_key": "1f2e3d", "project": "mine"}})
    with caplog.at_level(logging.INFO, "ds_core"):
        config.print("my config")
    assert "1f2e3d" not in caplog.text
    assert "mine" in caplog.text
    assert config.config.raw["comet"]["api_key"] == "1f2e3d"


def test_ranks_of_torch_distributed(ranks: Any) -> None:
    ranks(2, rank=1)
    config = DeepSpeedConfig(GIVEN)
    assert (config.train_micro_batch_size_per_gpu, config.world_size, config.global_rank) == (2, 2, 1)


def mpu(**answers: Any) -> Any:
    return SimpleNamespace(
        **{f"get_{name}_parallel_world_size": lambda value=value: value for name, value in answers.items()}
    )


def mesh(*dims: str, shape: tuple[int, ...] = (2, 3)) -> Any:
    return SimpleNamespace(mesh_dim_names=dims or None, size=lambda dim: shape[dim])


@pytest.mark.parametrize(
    ("given", "world_size"),
    [
        ({}, 6),
        ({"mpu": mpu(data=5, sequence=2)}, 5),
        ({"mpu": mpu(sequence=3)}, 2),
        ({"mpu": mpu(sequence=1.0), "mesh_device": mesh("data_parallel")}, 6),
        ({"mesh_device": mesh("data_parallel", "sequence_parallel")}, 2),
        ({"mesh_device": mesh("sequence_parallel", "data_parallel"), "sequence_parallel_size": 2}, 3),
        ({"sequence_parallel_size": 2}, 3),
        ({"sequence_parallel_size": "2"}, 3),
        ({"sequence_parallel_size": None}, 6),
        ({"sequence_parallel_size": "zork"}, 6),
    ],
)
def test_data_parallel_ranks(given: dict[str, Any], world_size: int, ranks: Any, tmp_path: Path) -> None:
    ranks(6)
    objects = {name: given[name] for name in ("mpu", "mesh_device") if name in given}
    raw = {name: value for name, value in given.items() if name not in objects}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    for source in (raw, path):
        found = data_parallel_world_size(source, **objects)
        assert (found, type(found)) == (world_size, int)


def test_the_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"train_batch_size": 6}')
    opened, reads = pathlib.Path.open, []

    def noted(path: Path, mode: str) -> Any:
        reads.append(path)
        return opened(path, mode)

    monkeypatch.setattr(pathlib.Path, "open", noted)
    config = DeepSpeedConfig(path)
    assert config.train_batch_size == 6
    assert reads == [path]


DIVISOR = "use a divisor of 6, or start another number of ranks"
BY_MPU = "mpu.get_sequence_parallel_world_size()"


@pytest.mark.parametrize(
    ("given", "what", "where", "fix"),
    [
        ({"mpu": mpu(sequence=4)}, "6 ranks cannot be divided into groups of 4", BY_MPU, DIVISOR),
        ({"mpu": mpu(sequence=0)}, "6 ranks cannot be divided into groups of 0", BY_MPU, DIVISOR),
        (
            {"config": {"sequence_parallel_size": 4}},
            "6 ranks cannot be divided into groups of 4",
            "sequence_parallel_size",
            DIVISOR,
        ),
        (
            {"mpu": object()},
            "mpu, a object, has neither get_data_parallel_world_size() nor get_sequence_parallel_world_size()",
            "DeepSpeedConfig(mpu)",
            "give it one of them",
        ),
        (
            {"mesh_device": mesh()},
            "mesh_device has no dim 'data_parallel', its dims are ()",
            "DeepSpeedConfig(mesh_device)",
            'pass mesh_dim_names=("data_parallel", "sequence_parallel") when making it',
        ),
    ],
)
def test_ranks_that_cannot_be_counted(given: dict[str, Any], what: str, where: str, fix: str, ranks: Any) -> None:
    ranks(6)
    with pytest.raises(ConfigError) as caught:
        DeepSpeedConfig(**{"config": {"train_batch_size": 6}, **given})
    assert (caught.value.what, caught.value.where, caught.value.fix) == (what, where, fix)


def test_batch_sizes_are_those_of_the_groups(ranks: Any) -> None:
    ranks(6)
    assert DeepSpeedConfig({"train_batch_size": 6}, mpu=mpu(sequence=3)).train_micro_batch_size_per_gpu == 3
    by_mesh = DeepSpeedConfig({"train_batch_size": 6}, mesh_device=mesh("data_parallel", "sequence_parallel"))
    assert by_mesh.train_micro_batch_size_per_gpu == 3
    with pytest.raises(ConfigError, match="sequence_parallel_size: got 2, which is not built yet"):
        DeepSpeedConfig({"train_batch_size": 6, "sequence_parallel_size": 2})


def test_root_names() -> None:
    assert ds_core.DeepSpeedConfig is DeepSpeedConfig
    assert ds_core.DeepSpeedConfigError is DeepSpeedConfigError is ConfigError


def test_writer(tmp_path: Path) -> None:
    given = {"fp16": {"enabled": True}}
    writer = DeepSpeedConfigWriter(given)
    writer.add_config("train_batch_size", 8)
    writer.data["fp16"]["enabled"] = False
    assert given == {"fp16": {"enabled": True}}
    path = tmp_path / "config.json"
    writer.write_config(str(path))
    assert json.loads(path.read_text()) == {"fp16": {"enabled": False}, "train_batch_size": 8}
    other = DeepSpeedConfigWriter()
    assert other.data == {}
    other.add_config("lost", 1)
    other.load_config(path)
    assert other.data == writer.data


def test_a_writer_that_cannot(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": {"b": 1, "b": 2}}')
    writer = DeepSpeedConfigWriter({"a": object()})
    with pytest.raises(ConfigError, match="cannot be written as JSON: Object of type object is not JSON"):
        writer.write_config(path)
    assert path.read_text() == '{"a": {"b": 1, "b": 2}}'
    with pytest.raises(ConfigError, match=r"a\.b: is given twice in one object"):
        writer.load_config(path)
    with pytest.raises(ConfigError, match=r"file not found: .*zork\.json"):
        writer.load_config(tmp_path / "zork.json")
