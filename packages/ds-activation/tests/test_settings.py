"""``configure`` and what is in force."""

from __future__ import annotations

import base64
import json
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ds_activation import settings
from ds_activation.attached import DeepSpeedActivation
from ds_activation.call import run
from ds_activation.settings import Settings, configure, current, in_force, is_configured
from ds_core import checkpointing, log
from ds_core.config import load_config
from ds_core.config.sections.activation import ActivationCheckpointingSection
from ds_core.errors import ConfigError
from ds_core.testing.memory import LiveStorage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MPU = SimpleNamespace(
    get_model_parallel_rank=lambda: 0,
    get_model_parallel_world_size=lambda: 1,
    get_model_parallel_group=lambda: None,
)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    settings.forget()
    log.reset()


def section(**keys: Any) -> dict[str, Any]:
    return {"activation_checkpointing": keys}


def test_at_first_nothing_is_set() -> None:
    assert not is_configured()
    assert current() == Settings()
    assert Settings().keeping() is None


def test_arguments_are_over_the_configuration() -> None:
    given = section(partition_activations=True, profile=True, number_checkpoints=3)
    configure(MPU, given, profile=False, checkpoint_in_cpu=True, synchronize=True)
    assert is_configured()
    assert current() == Settings(
        partition_activations=True,
        cpu_checkpointing=True,
        number_checkpoints=3,
        synchronize_checkpoint_boundary=True,
        mpu=MPU,
    )
    assert given == section(partition_activations=True, profile=True, number_checkpoints=3)


def test_all_forms_of_a_configuration(tmp_path: Path) -> None:
    text = json.dumps({"train_batch_size": 7, **section(cpu_checkpointing=True)})
    path = tmp_path / "config.json"
    path.write_text(text)
    for source in (json.loads(text), path, str(path), base64.urlsafe_b64encode(text.encode()).decode()):
        settings.forget()
        configure(None, source)
        assert current() == Settings(cpu_checkpointing=True)


def test_again_it_begins_from_the_defaults_but_for_the_mpu() -> None:
    configure(MPU, partition_activations=True, num_checkpoints=2)
    configure(None, {"activation_checkpointing": None})
    assert current() == Settings(mpu=MPU)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"deepspeed_config": section(partitioned_activations=True)}, "activation_checkpointing.partitioned_activ"),
        ({"deepspeed_config": section(profile=3)}, "activation_checkpointing.profile"),
        ({"deepspeed_config": {"activation_checkpointing": [1]}}, "activation_checkpointing"),
        ({"deepspeed_config": "no/such/file.json"}, "file not found"),
        ({"num_checkpoints": -1}, "number_checkpoints"),
        ({"contiguous_checkpointing": True, "num_checkpoints": 2}, "partition_activations is off"),
        ({"contiguous_checkpointing": True, "partition_activations": True}, "number_checkpoints buffers"),
        ({"mpu_": object()}, "get_model_parallel_rank"),
    ],
)
def test_what_is_wrong_changes_nothing(arguments: dict[str, Any], text: str) -> None:
    configure(MPU, profile=True)
    before = current()
    with pytest.raises(ConfigError, match=text):
        configure(**{"mpu_": None, "synchronize": True, **arguments})
    assert current() is before
    settings.forget()
    with pytest.raises(ConfigError, match=text):
        configure(**{"mpu_": None, **arguments})
    assert not is_configured()


def test_dividing_over_one_rank_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, log.logger.name):
        configure(MPU, partition_activations=True)
        assert not caplog.records
        settings.forget()
        configure(None, partition_activations=True)
    assert "over one rank" in caplog.text
    assert "mpu" in caplog.text


def test_lines_of_profile_are_heard(caplog: pytest.LogCaptureFixture) -> None:
    configure(None)
    assert log.logger.level == logging.NOTSET
    with caplog.at_level(logging.INFO, log.logger.name):
        configure(None, profile=True, checkpoint_in_cpu=True)
    assert "cpu_checkpointing=True" in caplog.text
    assert "profile=True" in caplog.text


def test_the_engine_whose_forward_runs_comes_first() -> None:
    configure(None, profile=True)
    first, second = Settings(cpu_checkpointing=True), Settings()
    with in_force(first):
        assert current() is first
        with in_force(second):
            assert current() is second
        with pytest.raises(KeyError), in_force(second):
            raise KeyError
        assert current() is first
    assert current() == Settings(profile=True)


def test_settings_of_a_section() -> None:
    parsed = ActivationCheckpointingSection.model_validate({"cpu_checkpointing": True, "number_checkpoints": 4})
    assert Settings.from_section(parsed, MPU) == Settings(cpu_checkpointing=True, number_checkpoints=4, mpu=MPU)
    wrong = ActivationCheckpointingSection.model_validate({"contiguous_memory_optimization": True})
    with pytest.raises(ConfigError, match="partition_activations"):
        Settings.from_section(wrong, MPU)


def test_single_flags() -> None:
    settings.set_num_layers(5)
    settings.partition_activations_in_checkpoint(True)
    assert current() == Settings(number_checkpoints=5, partition_activations=True)
    assert not is_configured()


def test_equal_settings_have_buffers_of_their_own() -> None:
    assert Settings() == Settings()
    assert Settings().buffers is not Settings().buffers


def test_reset_reaches_the_buffers_of_an_engines_section() -> None:
    flags = {"partition_activations": True, "contiguous_memory_optimization": True, "number_checkpoints": 1}
    of_section = Settings(**flags, mpu=MPU)
    x = torch.ones(2, requires_grad=True)
    with settings.in_force(of_section):
        held = run(torch.exp, (x,), {}, current())
        with pytest.raises(ConfigError, match=r"call checkpointing\.reset"):
            run(torch.exp, (x,), {}, current())
    settings.reset()
    with settings.in_force(of_section):
        assert run(torch.exp, (x,), {}, current()).requires_grad
    del held


def test_reset_frees_the_buffers_of_an_attached_section() -> None:
    flags = {"partition_activations": True, "contiguous_memory_optimization": True, "number_checkpoints": 3}
    model, given = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), section(policy="full", **flags)
    configure(MPU)
    config = load_config({"train_batch_size": 1, **given})
    attached = DeepSpeedActivation().attach(model, config, None, torch.device("cpu"))  # type: ignore[arg-type]
    x = torch.ones(16, 8, requires_grad=True)
    with LiveStorage() as live:
        with attached.active():
            model(x)  # and no backward: nobody holds what was kept
        assert live.live_bytes == 3 * x.nbytes
        checkpointing.reset()
        assert live.live_bytes == 0
    attached.detach()


def test_reset_makes_place_in_the_buffers() -> None:
    configure(MPU, partition_activations=True, contiguous_checkpointing=True, num_checkpoints=1)
    x = torch.ones(2, requires_grad=True)
    outs = [run(torch.exp, (x,), {}, current())]
    with pytest.raises(ConfigError, match="number_checkpoints is 1, and at least 2 checkpointed calls"):
        run(torch.exp, (x,), {}, current())
    settings.reset()
    outs.append(run(torch.exp, (x * 2,), {}, current()))
    sum(out.sum() for out in outs).backward()  # type: ignore[union-attr]
    assert x.grad is not None
    # What was in the old buffers is not lost.
    torch.testing.assert_close(x.grad, torch.ones(2).exp() + 2 * torch.full((2,), 2.0).exp())
    assert run(torch.exp, (x,), {}, current()).requires_grad, "free again after its backward"


def test_the_rest_of_a_configuration_is_not_looked_at() -> None:
    configure(None, {"fp16": {"enabld": True}, **section(cpu_checkpointing=True)})
    assert current() == Settings(cpu_checkpointing=True)


def test_compatibility_mode_drops_unknown_keys(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DS_CONFIG_COMPATIBLE", "1")
    with caplog.at_level(logging.WARNING, log.logger.name):
        configure(None, section(partitioned_activations=True, cpu_checkpointing=True))
    assert "partitioned_activations" in caplog.text
    assert current() == Settings(cpu_checkpointing=True)
