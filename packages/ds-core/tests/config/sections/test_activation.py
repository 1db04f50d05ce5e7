"""Section activation_checkpointing: policies for unmodified models, and how inputs of checkpointed calls are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ds_core.config import load_config
from ds_core.config.effects import without_effect
from ds_core.config.problems import validate
from ds_core.config.sections.activation import ActivationCheckpointingSection
from ds_core.testing.config import SectionContract

if TYPE_CHECKING:
    from ds_core.config import Section

DEFAULTS = {
    "policy": None,
    "modules": (),
    "interval": 2,
    "memory_budget": None,
    "partition_activations": False,
    "cpu_checkpointing": False,
    "contiguous_memory_optimization": False,
    "number_checkpoints": None,
    "synchronize_checkpoint_boundary": False,
    "profile": False,
}


class TestActivationCheckpointingSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return ActivationCheckpointingSection


def test_defaults() -> None:
    assert ActivationCheckpointingSection().model_dump() == DEFAULTS
    assert not ActivationCheckpointingSection.model_validate(DEFAULTS).is_on()


@pytest.mark.parametrize("policy", ["full", "every_n", "selective", "auto"])
def test_policies(policy: str) -> None:
    assert ActivationCheckpointingSection.model_validate({"policy": policy}).is_on()


def test_an_unknown_policy() -> None:
    _, (problem,) = validate(ActivationCheckpointingSection, {"policy": "fll"})
    assert '"full"' in problem.text


def test_one_pattern_may_stand_without_a_list() -> None:
    assert ActivationCheckpointingSection.model_validate({"modules": "h.*"}).modules == ("h.*",)


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"modules": ["h.*"]}, "modules"),
        ({"policy": "full", "interval": 3}, "interval"),
        ({"policy": "every_n", "memory_budget": 10**9}, "memory_budget"),
    ],
)
def test_a_key_that_its_policy_does_not_read(given: dict[str, object], path: str) -> None:
    found = without_effect(load_config({"train_batch_size": 1, "activation_checkpointing": given}))
    assert "only policy" in found[f"activation_checkpointing.{path}"]


def test_number_of_checkpoints() -> None:
    assert ActivationCheckpointingSection.model_validate({"number_checkpoints": 4.0}).number_checkpoints == 4
    _, (problem,) = validate(ActivationCheckpointingSection, {"number_checkpoints": -1})
    assert problem.text == "got -1, must be at least 0"
