"""Sections of the monitors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ds_core.config.problems import validate
from ds_core.config.sections.monitors import CometSection, CsvMonitorSection, TensorboardSection, WandbSection
from ds_core.testing.config import SectionContract

if TYPE_CHECKING:
    from ds_core.config import Section

DEFAULTS: dict[type[Section], dict[str, Any]] = {
    CsvMonitorSection: {"enabled": False, "output_path": "", "job_name": "DeepSpeedJobName"},
    TensorboardSection: {"enabled": False, "output_path": "", "job_name": "DeepSpeedJobName"},
    WandbSection: {"enabled": False, "group": None, "team": None, "project": "deepspeed"},
    CometSection: {
        "enabled": False,
        "samples_log_interval": 100,
        "project": None,
        "workspace": None,
        "api_key": None,
        "experiment_name": None,
        "experiment_key": None,
        "online": None,
        "mode": None,
    },
}


class TestCsvMonitorSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return CsvMonitorSection


class TestTensorboardSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return TensorboardSection


class TestWandbSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return WandbSection


class TestCometSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return CometSection


@pytest.mark.parametrize("section_class", DEFAULTS)
def test_defaults_and_switch(section_class: type[Section]) -> None:
    assert section_class().model_dump(by_alias=True) == DEFAULTS[section_class]
    assert section_class.model_validate(DEFAULTS[section_class]) == section_class()
    assert not section_class().is_on()
    assert section_class.model_validate({"enabled": True}).is_on()


@pytest.mark.parametrize("mode", ["get", "create", "get_or_create", None])
def test_modes_of_comet(mode: str | None) -> None:
    assert CometSection.model_validate({"mode": mode}).mode == mode


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"mode": "GET"}, 'got "GET", allowed are "get", "create" or "get_or_create"'),
        ({"samples_log_interval": 0}, "got 0, must be at least 1"),
        ({"online": "perhaps"}, 'got "perhaps", must be true or false'),
    ],
)
def test_what_comet_refuses(given: dict[str, Any], text: str) -> None:
    _, (problem,) = validate(CometSection, given)
    assert problem.text == text
