"""Sections comms_logger, flops_profiler and timers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ds_core.config.problems import validate
from ds_core.config.sections.profiling import (
    CommsLoggerSection,
    FlopsProfilerSection,
    ThroughputTimerSection,
    TimersSection,
)
from ds_core.testing.config import SectionContract

if TYPE_CHECKING:
    from ds_core.config import Section

DEFAULTS: dict[type[Section], dict[str, Any]] = {
    CommsLoggerSection: {"enabled": False, "prof_all": True, "prof_ops": (), "verbose": False, "debug": False},
    FlopsProfilerSection: {
        "enabled": False,
        "recompute_fwd_factor": 0.0,
        "profile_step": 1,
        "module_depth": -1,
        "top_modules": 1,
        "detailed": True,
        "output_file": None,
    },
    TimersSection: {"throughput": {"enabled": True, "synchronized": True}},
}


class TestCommsLoggerSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return CommsLoggerSection


class TestFlopsProfilerSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return FlopsProfilerSection


class TestThroughputTimerSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return ThroughputTimerSection


class TestTimersSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return TimersSection


@pytest.mark.parametrize("section_class", DEFAULTS)
def test_defaults(section_class: type[Section]) -> None:
    assert section_class().model_dump() == DEFAULTS[section_class]
    assert not section_class.model_validate(DEFAULTS[section_class]).is_on()


@pytest.mark.parametrize("section_class", [CommsLoggerSection, FlopsProfilerSection])
def test_switches(section_class: type[Section]) -> None:
    assert section_class.model_validate({"enabled": True}).is_on()
    assert not section_class.model_validate({"enabled": "auto"}).is_on()


def test_a_disabled_logger_is_off_whatever_it_would_log() -> None:
    section = CommsLoggerSection.model_validate({"enabled": False, "prof_all": False, "prof_ops": ["all_reduce"]})
    assert (section.is_on(), section.prof_ops) == (False, ("all_reduce",))


@pytest.mark.parametrize(
    ("given", "on"),
    [({}, False), ({"throughput": {"enabled": False}}, False), ({"throughput": {"synchronized": False}}, True)],
)
def test_timers(given: dict[str, Any], on: bool) -> None:
    assert TimersSection.model_validate(given).is_on() is on


@pytest.mark.parametrize(
    ("section_class", "given", "text"),
    [
        (CommsLoggerSection, {"prof_ops": "all_reduce"}, 'got "all_reduce", must be a list'),
        (FlopsProfilerSection, {"module_depth": -2}, "got -2, must be at least -1"),
        (FlopsProfilerSection, {"recompute_fwd_factor": -0.5}, "got -0.5, must be at least 0"),
        (FlopsProfilerSection, {"profile_step": -1}, "got -1, must be at least 0"),
        (FlopsProfilerSection, {"top_modules": 1.5}, "got 1.5, must be a whole number"),
        (TimersSection, {"throughput": {"sync": True}}, "unknown key (its value is true)"),
    ],
)
def test_what_is_refused(section_class: type[Section], given: dict[str, Any], text: str) -> None:
    _, (problem,) = validate(section_class, given)
    assert problem.text == text
