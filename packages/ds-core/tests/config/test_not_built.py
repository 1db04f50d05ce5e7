"""Sections that nothing acts on yet: present but off is fine, on is refused."""

from __future__ import annotations

from typing import Any

import pytest

from ds_core.config import Config, find_problems
from ds_core.config.not_built import SECTIONS, is_off

OFF = [
    ("activation_checkpointing", {"partition_activations": False, "number_checkpoints": None, "profile": False}),
    (
        "aio",
        {"block_size": 1048576, "queue_depth": 8, "thread_count": 1, "single_submit": False, "overlap_events": True},
    ),
    ("autotuning", {"enabled": False, "fast": True, "results_dir": "here"}),
    ("comms_logger", {"enabled": False, "prof_all": True}),
    ("compile", {"deepcompile": False}),
    ("compression_training", {"weight_quantization": {"shared_parameters": {"enabled": False, "quantize_groups": 1}}}),
    ("data_efficiency", {"enabled": False, "seed": 7}),
    ("data_efficiency", {"seed": 1234, "data_routing": {"enabled": False}}),
    ("elasticity", {"enabled": False, "max_train_batch_size": 2000}),
    ("flops_profiler", {"enabled": "auto", "profile_step": 5}),
    (
        "pipeline",
        {"stages": "auto", "partition": "best", "activation_checkpoint_interval": 0, "pipe_partitioned": True},
    ),
    ("tensor_parallel", {"autotp_size": 0}),
    ("tensor_parallel", {"autotp_size": 1, "tp": {"tp_size": 1}}),
    ("timers", {"throughput": {"enabled": True, "synchronized": True}}),
]
ON = [
    ("activation_checkpointing", {"cpu_checkpointing": True}),
    ("activation_checkpointing", {"number_checkpoints": 4}),
    ("aio", {"queue_depth": 16}),
    ("aio", {"single_submit": True}),
    ("amp", {"enabled": True, "opt_level": "O1"}),
    ("amp", {"opt_level": "O1"}),
    ("compile", {"deepcompile": True}),
    ("compression_training", {"weight_quantization": {"shared_parameters": {"enabled": True}}}),
    ("elasticity", {"enabled": 1}),
    ("pipeline", {"partition": "uniform"}),
    ("tensor_parallel", {"autotp_size": 2}),
    ("timers", {"throughput": {"synchronized": False}}),
    ("wandb", True),
]


@pytest.mark.parametrize("name", sorted(SECTIONS.keys() - {"timers"}))  # its flag is inside "throughput"
@pytest.mark.parametrize("value", [{}, None, {"enabled": False}, {"enabled": False, "zork": [3]}])
def test_off_whatever_the_section(name: str, value: Any) -> None:
    assert find_problems({name: value}) == []


@pytest.mark.parametrize(("name", "value"), OFF)
def test_off(name: str, value: Any) -> None:
    assert is_off(name, value)


@pytest.mark.parametrize(
    ("name", "value"), [*ON, *((name, {"enabled": True}) for name in SECTIONS if name != "timers")]
)
def test_on(name: str, value: Any) -> None:
    (problem,) = find_problems({name: value})
    assert problem.path == name
    assert problem.text == f"this section is not built yet; it comes with a later release of {SECTIONS[name][0]}"
    assert problem.fix is not None
    assert problem.fix.startswith(f'remove "{name}"')


def test_no_row_for_what_is_built() -> None:
    assert SECTIONS.keys() & Config.fields_by_key().keys() == set()
