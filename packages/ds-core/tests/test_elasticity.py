"""Elasticity under DeepSpeed's names."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from ds_core import elasticity
from ds_core.elasticity import (
    ElasticityConfigError,
    ElasticityError,
    ElasticityIncompatibleWorldSize,
    compute_elastic_config,
    elasticity_enabled,
    ensure_immutable_elastic_config,
)
from ds_core.errors import ConfigError, NotBuiltError

TARGET = "0.18.9"
FOUR = {"enabled": True, "max_train_batch_size": 4, "micro_batch_sizes": [1, 2, 3, 4], "max_gpus": 4, "version": 0.1}
TEN_THOUSAND = {"enabled": True, "max_train_batch_size": 10000, "micro_batch_sizes": [8, 12, 16, 17]}
NODES = {**TEN_THOUSAND, "num_gpus_per_node": 8, "model_parallel_size": 2}


@pytest.fixture(autouse=True)
def _no_world_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("DEEPSPEED_ELASTICITY_CONFIG", raising=False)


def compute(section: Any, **arguments: Any) -> Any:
    return compute_elastic_config({"elasticity": section}, TARGET, **arguments)


def test_version_1_needs_no_world_size() -> None:
    batch, valid = compute({**TEN_THOUSAND, "min_gpus": 32, "max_gpus": 1500, "version": 0.1})
    assert (batch, len(valid), valid[:6], valid[-2:]) == (9792, 23, [32, 34, 36, 48, 51, 64], [816, 1224])
    assert compute(FOUR) == (4, [1, 2, 4])


def test_a_client_calls_it_by_keywords_and_gets_the_micro_batch_of_its_world() -> None:
    section = {**TEN_THOUSAND, "min_gpus": 32, "max_gpus": 1500, "version": 0.1}
    config = {"elasticity": section, "train_batch_size": 3}
    before = copy.deepcopy(config)
    batch, valid, micro = compute_elastic_config(ds_config=config, target_deepspeed_version=TARGET, world_size=64)
    assert (batch, micro) == (9792, 17)
    assert type(valid) is list
    assert {type(size) for size in valid} == {int}
    assert config == before


def test_version_2_takes_gpus_and_returns_data_parallel_sizes() -> None:
    batch, valid, micro = compute(NODES, world_size=16)
    assert (batch, len(valid), valid[:3], valid[-1], micro) == (8640, 22, [4, 8, 12], 1080, 12)


def test_version_2_takes_the_number_of_gpus_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    batch, valid = compute(NODES)
    assert (batch, valid) == compute(NODES, world_size=16)[:2]
    assert compute(NODES, return_microbatch=True) == compute(NODES, world_size=16)
    assert compute(FOUR) == (4, [1, 2, 4])  # not read where it is not needed: 16 is none of these


def test_a_world_that_shares_the_batch_of_no_other_has_its_own_in_version_2() -> None:
    section = {"enabled": True, "max_train_batch_size": 100, "micro_batch_sizes": [4, 6]}
    assert compute(section, world_size=7) == (84, [7], 6)
    assert compute({**section, "prefer_larger_batch": False}, world_size=11) == (66, [11], 6)


def test_the_micro_batch_without_a_world_is_an_error_and_no_division_by_zero() -> None:
    for section, arguments in ((FOUR, {"return_microbatch": True}), (NODES, {})):
        with pytest.raises(ElasticityConfigError, match="the number of GPUs is not known"):
            compute(section, **arguments)


@pytest.mark.parametrize(("gpus", "fix"), [(5, "run on 4 or 8 GPUs"), (3, "run on 4 GPUs"), (9, "run on 8 GPUs")])
def test_gpus_that_are_no_whole_nodes(gpus: int, fix: str) -> None:
    section = {"enabled": True, "max_train_batch_size": 96, "micro_batch_sizes": [12], "num_gpus_per_node": 4}
    with pytest.raises(ElasticityIncompatibleWorldSize, match=f"{gpus} GPUs are not whole nodes of 4") as caught:
        compute(section, world_size=gpus)
    assert caught.value.fix == fix
    for size in fix.removeprefix("run on ").removesuffix(" GPUs").split(" or "):
        assert compute(section, world_size=int(size))[0] > 0


def test_gpus_that_are_whole_nodes_only_in_data_parallel_ranks() -> None:
    with pytest.raises(ElasticityIncompatibleWorldSize, match="9 GPUs are not whole nodes of 8"):
        compute(NODES, world_size=9)


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ("{}", ValueError, "the configuration must be a dict, got str"),
        ({}, ElasticityConfigError, "has no section elasticity"),
        ({"elasticity": {}}, ElasticityConfigError, "elasticity.enabled: got false"),
        ({"elasticity": {**FOUR, "enabled": False}}, ElasticityConfigError, "elasticity.enabled: got false"),
        ({"elasticity": [3]}, ElasticityConfigError, "elasticity: got "),
        ({"elasticity": {"enabled": True}}, ElasticityConfigError, "max_train_batch_size: is missing"),
        ({"elasticity": {**FOUR, "micro_batch_sizes": [0]}}, ElasticityConfigError, "got 0, must be at least 1"),
        ({"elasticity": {**FOUR, "max_gpu": 3}}, ElasticityConfigError, 'did you mean "max_gpus"'),
        ({"elasticity": {**FOUR, "max_train_batch_size": 3}}, ValueError, "4 samples are more than"),
        ({"elasticity": {**FOUR, "model_parallel_size": 2}}, ElasticityConfigError, "needs version 0.2"),
        ({"elasticity": {**FOUR, "version": 0.3}}, ElasticityConfigError, "got 0.3, allowed are 0.1 and 0.2"),
        ({"elasticity": {**FOUR, "version": 0.15}}, NotImplementedError, "got 0.15, allowed are 0.1 and 0.2"),
        ({"elasticity": {**NODES, "model_parallel_size": 3}}, ElasticityError, "not a multiple of model_parallel"),
    ],
)
def test_a_configuration_that_cannot_be_computed(config: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        compute_elastic_config(config, TARGET, world_size=24)
    assert text in str(caught.value)
    assert isinstance(caught.value, (ElasticityError, NotBuiltError))


@pytest.mark.parametrize("version", ["0.3.7", "0.1.0", "0", "new", ""])
def test_a_target_too_old(version: str) -> None:
    with pytest.raises(ElasticityError, match=r"elasticity needs 0\.3\.8 or later"):
        compute_elastic_config({"elasticity": FOUR}, version)


@pytest.mark.parametrize("version", ["0.3.8", "0.18.9+abc123", "0.10", "1", "v0.19.6"])
def test_a_target_new_enough(version: str) -> None:
    assert compute_elastic_config({"elasticity": FOUR}, version) == (4, [1, 2, 4])


@pytest.mark.parametrize("world", [-1, 1.5, True, "many", None])
def test_not_a_world_size(world: Any) -> None:
    with pytest.raises(ElasticityConfigError, match=r"world_size: got .*, must be a whole number from 0"):
        compute(FOUR, world_size=world)


def test_not_a_world_size_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ElasticityConfigError, match='WORLD_SIZE: got "many", must be a whole number'):
        compute(NODES)


def test_a_world_that_is_not_valid() -> None:
    with pytest.raises(ElasticityIncompatibleWorldSize, match="3 data-parallel ranks cannot share the elastic batch"):
        compute(FOUR, world_size=3)


def test_the_errors_are_of_one_family() -> None:
    assert issubclass(ElasticityConfigError, ElasticityError)
    assert issubclass(ElasticityIncompatibleWorldSize, ElasticityError)
    assert issubclass(ElasticityError, ConfigError)


@pytest.mark.parametrize(
    ("config", "is_on"),
    [
        ({}, False),
        ({"elasticity": {}}, False),
        ({"elasticity": {"enabled": False}}, False),
        ({"elasticity": None}, False),
        ({"elasticity": FOUR}, True),
    ],
)
def test_enabled(config: dict[str, Any], is_on: bool) -> None:
    assert elasticity_enabled(config) is is_on


def test_the_section_must_be_the_schedulers(monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_immutable_elastic_config(FOUR)
    monkeypatch.setenv("DEEPSPEED_ELASTICITY_CONFIG", json.dumps(FOUR))
    ensure_immutable_elastic_config(runtime_elastic_config_dict=FOUR)
    with pytest.raises(ElasticityConfigError, match=r"elasticity\.max_train_batch_size: got 8, and DEEPSPEED_"):
        ensure_immutable_elastic_config({**FOUR, "max_train_batch_size": 8})


def test_the_names_are_pinned() -> None:
    assert set(elasticity.__all__) == {
        "ElasticityConfigError",
        "ElasticityError",
        "ElasticityIncompatibleWorldSize",
        "compute_elastic_config",
        "elasticity_enabled",
        "ensure_immutable_elastic_config",
    }
