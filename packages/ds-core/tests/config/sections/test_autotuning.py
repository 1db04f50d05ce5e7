"""Section ``autotuning``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ds_core.config.problems import validate
from ds_core.config.sections.autotuning import AutotuningSection, ModelInfoSection
from ds_core.testing.config import SectionContract

if TYPE_CHECKING:
    from ds_core.config import Section


class TestContract(SectionContract):
    @pytest.fixture(params=[AutotuningSection, ModelInfoSection])
    def section_class(self, request: pytest.FixtureRequest) -> type[Section]:
        return request.param


def test_defaults() -> None:
    assert AutotuningSection().model_dump() == {
        "enabled": False,
        "fast": True,
        "results_dir": "autotuning_results",
        "exps_dir": "autotuning_exps",
        "overwrite": True,
        "start_profile_step": 3,
        "end_profile_step": 5,
        "metric": "throughput",
        "metric_path": None,
        "tuner_type": "gridsearch",
        "tuner_early_stopping": 5,
        "tuner_num_trials": 50,
        "arg_mappings": None,
        "model_info": None,
        "model_info_path": None,
        "mp_size": 1,
        "max_train_batch_size": None,
        "min_train_batch_size": 1,
        "max_train_micro_batch_size_per_gpu": 1024,
        "min_train_micro_batch_size_per_gpu": 1,
        "num_tuning_micro_batch_sizes": 3,
    }


@pytest.mark.parametrize(
    ("data", "path", "text"),
    [
        (
            {"metric": "throughputs"},
            "metric",
            'got "throughputs", allowed are "throughput", "latency", "flops", "forward" or "step"',
        ),
        (
            {"tuner_type": "grid"},
            "tuner_type",
            'got "grid", allowed are "gridsearch", "random" or "model_based"',
        ),
        ({"exps_dir": ""}, "exps_dir", 'got "", must not be empty'),
        ({"results_dir": ""}, "results_dir", 'got "", must not be empty'),
        ({"mp_size": 0}, "mp_size", "got 0, must be at least 1"),
        ({"start_profile_step": -1}, "start_profile_step", "got -1, must be at least 0"),
        ({"model_info": 3}, "model_info", "got 3, must be an object { ... }"),
        ({"arg_mappings": {"lr": 3}}, "arg_mappings.lr", "got 3, must be text"),
    ],
)
def test_a_bad_value(data: dict[str, Any], path: str, text: str) -> None:
    _, (problem,) = validate(AutotuningSection, data)
    assert (problem.path, problem.text) == (path, text)


def test_an_unknown_key_of_the_model() -> None:
    _, (problem,) = validate(AutotuningSection, {"model_info": {"num_parms": 3}})
    assert (problem.path, problem.fix) == ("model_info.num_parms", 'did you mean "num_params"?')


def test_on_and_off() -> None:
    assert not AutotuningSection(fast=False, results_dir="here", model_info={"profile": True}).is_on()
    assert AutotuningSection(enabled=True).is_on()
    assert AutotuningSection.comes_with == "ds-core"
