"""The keys of section ``elasticity``."""

from __future__ import annotations

from typing import Any

import pytest

from ds_core.config.problems import validate
from ds_core.config.sections.elasticity import ElasticitySection

DEFAULTS = {
    "enabled": False,
    "max_train_batch_size": 2000,
    "micro_batch_sizes": (2, 4, 6),
    "min_gpus": 1,
    "max_gpus": 10000,
    "min_time": 0.0,
    "prefer_larger_batch": True,
    "ignore_non_elastic_batch_info": False,
    "version": 0.2,
    "num_gpus_per_node": 1,
    "model_parallel_size": 1,
}


def problems(**keys: Any) -> list[str]:
    _, found = validate(ElasticitySection, keys, path=("elasticity",))
    return [f"{problem.path}: {problem.text}" for problem in found]


def test_the_defaults() -> None:
    assert ElasticitySection().model_dump() == DEFAULTS
    assert not ElasticitySection().is_on()
    assert ElasticitySection.descriptions().keys() == DEFAULTS.keys()


@pytest.mark.parametrize("on", [True, 1, "true"])
def test_what_to_choose_from_is_required_only_while_it_is_on(on: Any) -> None:
    why = "is missing, and the section is enabled"
    missing = [f"elasticity.max_train_batch_size: {why}", f"elasticity.micro_batch_sizes: {why}"]
    assert problems(enabled=on) == missing
    assert problems(enabled=on, micro_batch_sizes="auto", max_train_batch_size=8) == missing[1:]
    assert problems(enabled=on, micro_batch_sizes=[2], max_train_batch_size=8) == []


@pytest.mark.parametrize("off", [False, 0, "false", "auto"])
def test_nothing_is_required_while_it_is_off(off: Any) -> None:
    section = ElasticitySection.model_validate({"enabled": off})
    assert section.model_dump() == DEFAULTS


def test_the_name_of_the_documentation_is_understood() -> None:
    assert not ElasticitySection.model_validate({"prefer_large_batch": False}).prefer_larger_batch


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("max_train_batch_size", 0, "got 0, allowed are 1 to 2147483647"),
        ("max_train_batch_size", 2**31, "got 2147483648, allowed are 1 to 2147483647"),
        ("micro_batch_sizes", 4, "got 4, must be a list"),
        ("micro_batch_sizes", [], "got [], must be a list of 1 to 100 whole numbers"),
        ("min_gpus", 0, "got 0, must be at least 1"),
        ("max_gpus", 1.5, "got 1.5, must be a whole number"),
        ("min_time", -1, "got -1, must be at least 0"),
        ("version", 0.3, "got 0.3, allowed are 0.1 and 0.2"),
        ("version", "new", 'got "new", must be a finite number'),
        ("num_gpus_per_node", 0, "got 0, must be at least 1"),
        ("model_parallel_size", True, "got true, must be a whole number"),
    ],
)
def test_a_value_outside_its_bounds(key: str, value: Any, text: str) -> None:
    assert problems(**{key: value}) == [f"elasticity.{key}: {text}"]


def test_each_bad_size_is_named() -> None:
    assert problems(micro_batch_sizes=[1, 0, "x"]) == [
        "elasticity.micro_batch_sizes[1]: got 0, must be at least 1",
        'elasticity.micro_batch_sizes[2]: got "x", must be a whole number',
    ]
    (text,) = problems(micro_batch_sizes=[1] * 101)
    assert text.endswith("must be a list of 1 to 100 whole numbers")
