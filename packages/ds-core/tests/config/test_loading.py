"""load_config as a whole: plugins' own sections, and everything reported at once."""

from __future__ import annotations

from typing import Any

import pytest

from ds_core import registry
from ds_core.config import ConfigError, PositiveInt, Section, find_problems, load_config
from ds_core.errors import PluginError


class RocketSection(Section):
    """A section of some third package."""

    enabled: bool = False
    """Use it."""
    engines: PositiveInt = 1
    """How many."""


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    classes: dict[str, Any] = {"rocket": RocketSection, "broken": dict}
    names = registry.names
    monkeypatch.setattr(registry, "names", lambda seam: tuple(classes) if seam == "config" else names(seam))
    monkeypatch.setattr(registry, "load", lambda seam, name, needed_by=None: classes[name])


def test_section_of_a_plugin() -> None:
    config = load_config({"train_batch_size": 1, "rocket": {"enabled": True, "engines": "2"}})
    assert config._further == {"rocket": RocketSection(enabled=True, engines=2)}


def test_null_section_of_a_plugin_is_its_defaults() -> None:
    assert load_config({"train_batch_size": 1, "rocket": None})._further == {"rocket": RocketSection()}


def test_section_of_a_plugin_not_given() -> None:
    assert load_config({"train_batch_size": 1})._further == {}


def test_problems_in_a_section_of_a_plugin() -> None:
    problems = find_problems({"rocket": {"engines": 0, "enabld": True}, "rokcet": {}})
    assert [(problem.path, problem.text, problem.fix) for problem in problems] == [
        ("rocket.engines", "got 0, must be at least 1", None),
        ("rocket.enabld", "unknown key (its value is true)", 'did you mean "enabled"?'),
        ("rokcet", "unknown key (its value is {})", 'did you mean "rocket"?'),
    ]


def test_a_plugin_whose_class_is_no_section() -> None:
    with pytest.raises(PluginError, match=r"must derive from ds_core\.config\.Section"):
        load_config({"broken": {}})


def test_rules_across_sections_run_beside_other_problems() -> None:
    both = {"fp16": {"enabled": True}, "bf16": {"enabled": True}}
    paths = [problem.path for problem in find_problems(both | {"checkpoint": {"tag_validation": 3}, "zork": 1})]
    assert paths == ["fp16.enabled", "checkpoint.tag_validation", "zork"]


def test_a_misspelt_section_is_looked_into_under_its_right_name() -> None:
    config = {
        "zero_optimisation": {"stage": 7, "offload_optimiser": {"device": "gpu", "pinmemory": True}},
        "optimizer": {"type": "Adam", "learning_rat": 1, "params": {"bettas": [0, 1], "max_grad_norm": 1}},
    }
    assert [problem.path for problem in find_problems(config)] == [
        "zero_optimisation",
        "zero_optimisation.stage",
        "zero_optimisation.offload_optimiser",
        "zero_optimisation.offload_optimiser.device",
        "zero_optimisation.offload_optimiser.pinmemory",
        "optimizer.learning_rat",
        "optimizer.params.bettas",
        "optimizer.params.max_grad_norm",
    ]


def test_a_key_in_the_wrong_place_is_read_where_it_belongs() -> None:
    config = {"stage": 2, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert [problem.path for problem in find_problems(config)] == ["stage"]


def test_very_many_problems_are_counted() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"train_batch_size": 1, **{f"zork{index}": 1 for index in range(500)}})
    assert caught.value.what.startswith("500 problems in the configuration")
    assert caught.value.what.endswith("  and 400 more")


def test_two_names_of_one_section_are_reported_with_the_rest() -> None:
    problems = find_problems({"bf16": {}, "bfloat16": {}, "fp16": {"zork": 1}})
    assert [problem.path for problem in problems] == ["bfloat16", "fp16.zork"]


UNRESOLVED: dict[str, Any] = {
    "train_batch_size": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
}


def test_auto_is_a_problem_only_of_a_run() -> None:
    assert find_problems(UNRESOLVED) == []
    paths = [problem.path for problem in find_problems(UNRESOLVED, dp_world_size=1)]
    assert paths == ["train_batch_size", "optimizer.params.lr"]


def test_auto_elsewhere_is_the_default() -> None:
    config = load_config(UNRESOLVED | {"train_batch_size": 1, "optimizer": None})
    assert (config.gradient_clipping, config.zero_optimization.reduce_bucket_numel) == (1.0, 500_000_000)


def test_batch_sizes_are_a_problem_only_of_a_run() -> None:
    assert find_problems({}) == []
    assert find_problems({"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2}) == []
    assert [problem.path for problem in find_problems({"train_batch_size": 0})] == ["train_batch_size"]


def test_resolved_sizes() -> None:
    config = load_config({"train_batch_size": 24.0, "train_micro_batch_size_per_gpu": "3"}, dp_world_size=2)
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (24, 3)
    assert config.gradient_accumulation_steps == 4


def test_the_world_size_is_checked() -> None:
    with pytest.raises(ConfigError, match="data-parallel ranks: got 0"):
        load_config({"train_batch_size": 4}, dp_world_size=0)
