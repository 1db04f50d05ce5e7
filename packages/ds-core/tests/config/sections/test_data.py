"""Sections ``data_efficiency``, ``curriculum_learning`` and ``progressive_layer_drop``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ds_core.config.problems import Problem, validate
from ds_core.config.sections import data
from ds_core.config.sections.data import (
    CurriculumLearningSection,
    DataEfficiencySection,
    DynamicBatchingSection,
    ProgressiveLayerDropSection,
    RandomLtdSection,
    SamplingCurriculumSection,
)
from ds_core.testing.config import SectionContract

if TYPE_CHECKING:
    from ds_core.config import Section


class TestContract(SectionContract):
    @pytest.fixture(params=data.__all__)
    def section_class(self, request: pytest.FixtureRequest) -> type[Section]:
        return getattr(data, request.param)

    def test_its_schema_has_every_key(self, section_class: type[Section]) -> None:
        schema = section_class.model_json_schema(by_alias=True)
        assert schema["properties"].keys() == section_class.model_fields.keys()


SCHEDULE = {
    "min_difficulty": 8,
    "max_difficulty": 1024,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 100, "difficulty_step": 8},
}


def only(section: type[Section], value: Any) -> Problem:
    _, (problem,) = validate(section, value)
    return problem


def curriculum(**values: Any) -> dict[str, Any]:
    return {"data_sampling": {"curriculum_learning": values}}


def test_defaults() -> None:
    everything = DataEfficiencySection()
    sampling, routing = everything.data_sampling, everything.data_routing
    assert (everything.enabled, everything.seed) == (False, 1234)
    assert (sampling.enabled, sampling.num_epochs, sampling.num_workers, sampling.pin_memory) == (False, 1000, 0, False)
    assert sampling.curriculum_learning.model_dump() == {
        "enabled": False,
        "data_cluster_path": None,
        "curriculum_metrics": {},
    }
    assert sampling.dynamic_batching.model_dump() == {
        "enabled": False,
        "lr_scaling_method": "linear",
        "min_batch_size": 1,
        "max_batch_size": None,
        "sequence_picking_order": "dataloader",
        "max_tokens": None,
        "metrics_path": None,
        "verbose": False,
    }
    assert (routing.enabled, routing.random_ltd.enabled) == (False, False)
    assert routing.random_ltd.random_ltd_schedule.schedule_type == "fixed_linear"
    assert routing.random_ltd.layer_token_lr_schedule.enabled is False


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"enabled": False, "seed": 7},
        {"seed": 1234, "data_routing": {"enabled": False}},
        {"data_sampling": {"num_workers": 4}, "data_routing": {"random_ltd": {"total_layer_num": 12}}},
        curriculum(enabled=False, curriculum_metrics={"seqlen": {"min_difficulty": 8}}),
    ],
)
def test_off(value: dict[str, Any]) -> None:
    assert not DataEfficiencySection.model_validate(value).is_on()


@pytest.mark.parametrize(
    "value",
    [
        {"enabled": True},
        {"enabled": False, "data_sampling": {"enabled": True}},
        {"enabled": False, **curriculum(enabled=True, curriculum_metrics={"seqlen": SCHEDULE})},
        {"data_sampling": {"dynamic_batching": {"enabled": True, "max_tokens": 2048}}},
        {"data_routing": {"enabled": True}},
        {"data_routing": {"random_ltd": {"enabled": True}}},
    ],
)
def test_on_as_soon_as_one_flag_is_true(value: dict[str, Any]) -> None:
    assert DataEfficiencySection.model_validate(value).is_on()
    assert DataEfficiencySection.comes_with == "ds-core"


def test_an_unknown_key_in_a_metric() -> None:
    problem = only(DataEfficiencySection, curriculum(curriculum_metrics={"seqlen": {"min_dificulty": 8}}))
    assert problem.path == "data_sampling.curriculum_learning.curriculum_metrics.seqlen.min_dificulty"
    assert problem.fix == 'did you mean "min_difficulty"?'
    config = {"total_curriculum_steps": 8}
    problem = only(DataEfficiencySection, curriculum(curriculum_metrics={"seqlen": {"schedule_config": config}}))
    assert problem.path.endswith("curriculum_metrics.seqlen.schedule_config.total_curriculum_steps")
    assert problem.fix == 'did you mean "total_curriculum_step"?'


@pytest.mark.parametrize(
    ("section", "key", "allowed"),
    [
        (DynamicBatchingSection, "lr_scaling_method", '"linear", "sqrt" or "none"'),
        (DynamicBatchingSection, "sequence_picking_order", '"dataloader", "random" or "seqlen"'),
        (data.CurriculumMetricSection, "difficulty_type", '"value" or "percentile"'),
        (data.CurriculumMetricSection, "schedule_type", '"fixed_discrete", "fixed_linear", "fixed_root" or "custom"'),
        (CurriculumLearningSection, "schedule_type", '"fixed_discrete", "fixed_linear", "fixed_root" or "custom"'),
        (data.RandomLtdScheduleSection, "schedule_type", '"fixed_linear"'),
    ],
)
def test_words(section: type[Section], key: str, allowed: str) -> None:
    expected = f"allowed are {allowed}" if " or " in allowed else f"only {allowed} is allowed"
    assert only(section, {key: "zork"}).text == f'got "zork", {expected}'


@pytest.mark.parametrize(
    ("section", "value", "path"),
    [
        (DynamicBatchingSection, {"min_batch_size": 0}, "min_batch_size"),
        (DynamicBatchingSection, {"max_tokens": 0}, "max_tokens"),
        (DataEfficiencySection, {"seed": 1.5}, "seed"),
        (DataEfficiencySection, {"data_sampling": {"num_workers": -1}}, "data_sampling.num_workers"),
        (RandomLtdSection, {"random_ltd_layer_id": [1, -1]}, "random_ltd_layer_id[1]"),
        (RandomLtdSection, {"random_ltd_layer_id": 3}, "random_ltd_layer_id"),
        (ProgressiveLayerDropSection, {"theta": 1.5}, "theta"),
        (ProgressiveLayerDropSection, {"gamma": -1}, "gamma"),
        (CurriculumLearningSection, {"curriculum_type": ""}, "curriculum_type"),
        (CurriculumLearningSection, {"schedule_config": {"root_degree": 0}}, "schedule_config.root_degree"),
        (CurriculumLearningSection, {"schedule_config": {"max_step": [-1]}}, "schedule_config.max_step[0]"),
    ],
)
def test_bounds(section: type[Section], value: dict[str, Any], path: str) -> None:
    assert only(section, value).path == path


def missing(section: type[Section], value: dict[str, Any]) -> list[str]:
    _, problems = validate(section, value)
    assert all(problem.text.startswith("is missing") for problem in problems)
    assert [problem.fix for problem in problems] == [f'add "{problem.keys[-1]}"' for problem in problems]
    return [problem.path for problem in problems]


def test_what_an_enabled_section_needs() -> None:
    held = "data_sampling.curriculum_learning.curriculum_metrics"
    assert missing(DataEfficiencySection, curriculum(enabled=True)) == [held]
    assert missing(DataEfficiencySection, curriculum(enabled="yes", curriculum_metrics={})) == [held]
    assert missing(DynamicBatchingSection, {"enabled": True}) == ["max_tokens"]
    assert missing(DynamicBatchingSection, {"enabled": True, "max_tokens": None}) == ["max_tokens"]
    assert missing(DynamicBatchingSection, {"enabled": False}) == []
    # What else is wrong is told beside it.
    _, problems = validate(DynamicBatchingSection, {"enabled": True, "min_batch_size": 0})
    assert {problem.path for problem in problems} == {"max_tokens", "min_batch_size"}


@pytest.mark.parametrize(
    ("schedule", "absent"),
    [
        ({"schedule_type": None, "min_difficulty": None}, ["min_difficulty", "schedule_type"]),
        ({"max_difficulty": "auto"}, ["max_difficulty"]),
        ({"schedule_config": {}}, ["schedule_config.total_curriculum_step", "schedule_config.difficulty_step"]),
        ({"schedule_config": None}, ["schedule_config.total_curriculum_step", "schedule_config.difficulty_step"]),
        ({"schedule_type": "fixed_root"}, ["schedule_config.root_degree"]),
        ({"schedule_type": "fixed_discrete"}, ["schedule_config.difficulty", "schedule_config.max_step"]),
    ],
)
def test_what_a_metric_needs(schedule: dict[str, Any], absent: list[str]) -> None:
    metrics = {"good": SCHEDULE, "mine": SCHEDULE | schedule}
    held = "data_sampling.curriculum_learning.curriculum_metrics.mine"
    paths = missing(DataEfficiencySection, curriculum(enabled=True, curriculum_metrics=metrics))
    assert sorted(paths) == sorted(f"{held}.{key}" for key in absent)
    assert validate(DataEfficiencySection, curriculum(curriculum_metrics=metrics))[1] == []


def test_a_discrete_schedule_has_one_step_less_than_values() -> None:
    schedule = {"schedule_type": "fixed_discrete", "schedule_config": {"difficulty": [1, 2], "max_step": [5, 9]}}
    metrics = {"good": SCHEDULE, "mine": SCHEDULE | schedule}
    problem = only(DataEfficiencySection, curriculum(enabled=True, curriculum_metrics=metrics))
    held = "data_sampling.curriculum_learning.curriculum_metrics.mine"
    assert problem.path == f"{held}.schedule_config.difficulty"
    assert problem.text == "got [1, 2], must have one value more than max_step, which has 2"
    assert validate(DataEfficiencySection, curriculum(curriculum_metrics=metrics))[1] == []
    problem = only(CurriculumLearningSection, {"enabled": True, **SCHEDULE, **schedule})
    assert problem.path == "schedule_config.difficulty"


@pytest.mark.parametrize("metrics", [3, [], "x", {"mine": 3}, {"mine": {"schedule_config": 3}}, {3: {}}])
def test_what_is_no_metric_is_told(metrics: object) -> None:
    _, problems = validate(SamplingCurriculumSection, {"enabled": True, "curriculum_metrics": metrics})
    assert problems != []


@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"schedule_type": "custom", "schedule_config": {}},
        {"schedule_type": "fixed_discrete", "schedule_config": {"difficulty": [1, 2], "max_step": [5]}},
        {
            "schedule_type": "fixed_root",
            "schedule_config": {"total_curriculum_step": 9, "difficulty_step": 1, "root_degree": 2},
        },
    ],
)
def test_whole_schedules(schedule: dict[str, Any]) -> None:
    value = {"enabled": True, "curriculum_type": "seqlen", **SCHEDULE, **schedule}
    section, problems = validate(CurriculumLearningSection, value)
    assert problems == []
    assert section is not None
    assert section.is_on()


def test_the_legacy_section() -> None:
    assert not CurriculumLearningSection(min_difficulty=8).is_on()
    assert missing(CurriculumLearningSection, {"enabled": True, **SCHEDULE, "min_difficulty": None}) == [
        "min_difficulty"
    ]
    assert CurriculumLearningSection.comes_with == "ds-core"


def test_a_schedule_that_nobody_has() -> None:
    problem = only(RandomLtdSection, {"layer_token_lr_schedule": {"enabled": True}})
    assert problem.path == "layer_token_lr_schedule.enabled"
    assert problem.text == "got true, which DeepSpeed does not have either; only false is accepted"


def test_progressive_layer_drop() -> None:
    assert ProgressiveLayerDropSection().model_dump() == {"enabled": False, "theta": 1.0, "gamma": 0.001}
    assert not ProgressiveLayerDropSection(theta=0.5).is_on()
    assert ProgressiveLayerDropSection(enabled=True).is_on()
    assert ProgressiveLayerDropSection.comes_with == "ds-core"
