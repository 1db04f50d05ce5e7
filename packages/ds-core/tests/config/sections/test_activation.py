"""Section activation_checkpointing: says by itself that it changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ds_core.config.problems import validate
from ds_core.config.sections.activation import ActivationCheckpointingSection
from ds_core.testing.config import SectionContract

if TYPE_CHECKING:
    from ds_core.config import Section

DEFAULTS = {
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


def test_it_is_not_refused_but_says_why_it_does_nothing() -> None:
    assert ActivationCheckpointingSection.comes_with == ""
    assert "checkpointing.configure(deepspeed_config=...)" in ActivationCheckpointingSection.no_effect
    assert ActivationCheckpointingSection(cpu_checkpointing=True).is_on()


def test_number_of_checkpoints() -> None:
    assert ActivationCheckpointingSection.model_validate({"number_checkpoints": 4.0}).number_checkpoints == 4
    _, (problem,) = validate(ActivationCheckpointingSection, {"number_checkpoints": -1})
    assert problem.text == "got -1, must be at least 0"
