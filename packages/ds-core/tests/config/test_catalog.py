"""The rarer sections: present but off is fine, on is refused by name until something carries them out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from ds_core.config import Config, find_problems, load_config
from ds_core.config.catalog import RARE, all_sections, rare_section
from ds_core.config.section import Section

LATER = sorted(name for name in RARE if rare_section(name).comes_with)
OFF = [
    ("activation_checkpointing", {"partition_activations": False, "number_checkpoints": None, "profile": False}),
    ("aio", {"queue_depth": 16, "thread_count": 2, "single_submit": True}),
    ("autotuning", {"enabled": False, "fast": True, "results_dir": "here"}),
    ("comms_logger", {"enabled": False, "prof_all": True}),
    ("compile", {"deepcompile": False}),
    ("compression_training", {"weight_quantization": {"shared_parameters": {"enabled": False, "quantize_groups": 1}}}),
    ("datastates_ckpt", False),
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
    ("amp", {"opt_level": "O1"}),
    *((name, {"enabled": True}) for name in ("autotuning", "comet", "comms_logger")),
    (
        "curriculum_learning",
        {"enabled": True, "min_difficulty": 8, "max_difficulty": 64, "schedule_type": "fixed_linear"}
        | {"schedule_config": {"total_curriculum_step": 100, "difficulty_step": 8}},
    ),
    *((name, {"enabled": True}) for name in ("flops_profiler", "hybrid_engine", "nebula", "progressive_layer_drop")),
    *((name, {"enabled": True}) for name in ("quantize_training", "tensorboard", "wandb")),
    ("data_efficiency", {"data_sampling": {"enabled": True}}),
    ("datastates_ckpt", {}),
    ("expert_parallel", {"enabled": True, "preset_model": "mixtral"}),
    ("inference", {"tensor_parallel": {"tp_size": 2}}),
    ("weight_quantization", {"num_bits": 4}),
    ("amp", {"enabled": True, "opt_level": "O1"}),
    ("compile", {"deepcompile": True}),
    ("compression_training", {"layer_reduction": {"enabled": True}}),
    ("pipeline", {"partition": "uniform"}),
    ("tensor_parallel", {"autotp_size": 2}),
    ("timers", {"throughput": {"synchronized": False}}),
]


@pytest.mark.parametrize("name", sorted(RARE))
@pytest.mark.parametrize("value", [{}, None, "auto"])
def test_off_whatever_the_section(name: str, value: Any) -> None:
    if (name, value) == ("datastates_ckpt", {}):
        return  # its presence turns it on
    assert find_problems({name: value}) == []


@pytest.mark.parametrize(("name", "value"), OFF)
def test_off(name: str, value: Any) -> None:
    assert find_problems({name: value}) == []


@pytest.mark.parametrize(("name", "value"), ON)
def test_on(name: str, value: Any) -> None:
    (problem,) = find_problems({name: value})
    assert problem.path == name
    package = rare_section(name).comes_with
    assert problem.text == f"this section is not built yet; it comes with a later release of {package}"
    assert problem.fix is not None
    assert problem.fix.startswith(f'remove "{name}"')


def test_every_section_that_comes_later_is_turned_on_above() -> None:
    assert {name for name, _ in ON} == set(LATER)


def test_a_section_is_in_one_place() -> None:
    assert RARE.keys() & Config.fields_by_key().keys() == set()
    assert list(all_sections()) == sorted(all_sections())
    assert all(issubclass(section, Section) for section in all_sections().values())


@pytest.mark.parametrize("name", sorted(RARE))
def test_a_rare_section_is_reached_through_the_config(name: str) -> None:
    assert load_config({"train_batch_size": 1}).section(name) == rare_section(name)()


def test_rare_sections_are_imported_for_those_who_have_them() -> None:
    code = (
        "import sys; from ds_core.config import load_config; load_config({'train_batch_size': 1, 'fp16': {}})\n"
        "assert 'ds_core.config.sections.compression' not in sys.modules\n"
        "assert 'ds_core.config.sections.arguments' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
