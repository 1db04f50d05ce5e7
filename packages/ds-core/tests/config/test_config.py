"""Config: defaults, legacy forms, and the options of plugins."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from ds_core import registry
from ds_core.config import Config, ConfigError, PositiveInt, Section, find_problems, load_config
from ds_core.config.catalog import all_sections

BATCH = {"train_batch_size": 1}


class Options(Section):
    """Options of an engine."""

    writers: PositiveInt = 1
    """Threads."""


def load(**values: Any) -> Config:
    return load_config(BATCH | values)


def test_defaults() -> None:
    config = load()
    assert (config.gradient_clipping, config.steps_per_print, config.log_level) == (1.0, None, None)
    assert (config.optimizer, config.scheduler) == (None, None)
    assert (config.zero_optimization.stage, config.fp16.enabled, config.bf16.enabled) == (0, False, False)
    assert (config.checkpoint.engine, config.checkpoint.tag_validation) == (None, "Warn")
    assert (config.precision.type, config.partition.type) == (None, None)
    assert config.managed_gradient_accumulation
    assert not config.dataloader_drop_last
    assert not config.csv_monitor.enabled


def test_every_key_may_be_given_at_its_default() -> None:
    # Whoever writes down all the defaults must not be told that some of them are not built.
    written = load().model_dump(by_alias=True, mode="json")
    assert load_config(written).model_dump() == load().model_dump()


def null_everywhere(section: Section) -> dict[str, Any]:
    """Return a configuration that gives null for each key that is no section, unless null is a value of its own."""
    found = {}
    for name, info in type(section).model_fields.items():
        value, key = getattr(section, name), info.serialization_alias or name
        if isinstance(value, Section):
            found[key] = null_everywhere(value)
        elif value is None or section.is_left_out(key, None):
            found[key] = None
    return found


def test_null_is_the_default_of_every_key() -> None:
    sections = {name: load().section(name) for name in all_sections()}
    given = {name: null_everywhere(section) for name, section in sections.items() if section is not None}
    del given["datastates_ckpt"]  # on by being there
    config = load(**null_everywhere(load()) | BATCH | given)
    for name in given:
        assert config.section(name) == load().section(name), name
    assert load(**dict.fromkeys(given)).model_dump() == load().model_dump()


@pytest.mark.parametrize(("size", "is_built"), [(None, True), (1, True), ("1", True), ("auto", True), (2, False)])
@pytest.mark.parametrize("key", ["data_parallel_size", "sequence_parallel_size"])
def test_ranks_of_a_mesh(key: str, size: Any, is_built: bool) -> None:
    assert (find_problems({key: size}) == []) is is_built


@pytest.mark.parametrize("never", [float("inf"), "inf", None])
def test_print_never(never: Any) -> None:
    assert load(steps_per_print=never).steps_per_print is None


@pytest.mark.parametrize("section", ["optimizer", "zero_optimization", "fp16", "checkpoint", "csv_monitor"])
def test_null_section_is_an_absent_one(section: str) -> None:
    assert load(**{section: None}).model_dump() == load().model_dump()


def test_bfloat16() -> None:
    assert load(bfloat16={"enabled": True}).bf16.enabled


def test_null_params() -> None:
    config = load(optimizer={"type": "Adam", "params": None}, scheduler={"type": "WarmupLR"})
    assert config.optimizer is not None
    assert config.scheduler is not None
    assert (config.optimizer.params, config.scheduler.params) == ({}, {})


def test_words_in_any_case() -> None:
    config = load(log_level="INFO", gradient_allreduce_op="Mean", checkpoint={"tag_validation": "FAIL"})
    assert (config.log_level, config.gradient_allreduce_op, config.checkpoint.tag_validation) == (
        "info",
        "mean",
        "Fail",
    )


@pytest.mark.parametrize(("legacy", "stage"), [(True, 1), (False, 0)])
def test_legacy_zero(legacy: bool, stage: int) -> None:
    assert load(zero_optimization=legacy).zero_optimization.stage == stage


def test_legacy_zero_takes_the_size_at_the_top() -> None:
    assert load(zero_optimization=True, allgather_size=100).zero_optimization.allgather_bucket_numel == 100


def test_options_of_the_chosen_plugin() -> None:
    config = load(checkpoint={"engine": "sharded", "sharded": {"writers": 4}})
    assert config.checkpoint.engine == "sharded"
    assert config.options("checkpoint", "sharded", Options) == Options(writers=4)


@pytest.mark.parametrize(
    ("given", "installed", "name", "why"),
    [
        ({}, ("plain",), "plain", "the default without ds-ckpt"),
        ({}, ("plain", "sharded"), "sharded", "the default where ds-ckpt is installed"),
        ({"engine": "plain"}, ("plain", "sharded"), "plain", "as checkpoint.engine says"),
        ({"engine": "sharded"}, ("plain",), "sharded", "as checkpoint.engine says"),
        ({"writer": {"type": "fast"}}, ("plain",), "plain", "the default without ds-ckpt"),
        ({"writer": {"decoupled": True}}, ("plain",), "async", "as checkpoint.writer.decoupled says"),
        ({"writer": {"decoupled": True}, "engine": "mine"}, ("plain",), "mine", "as checkpoint.engine says"),
    ],
)
def test_the_engine_of_checkpoints(
    given: dict[str, Any], installed: tuple[str, ...], name: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "names", lambda seam: installed)
    config = load(checkpoint=given)
    assert (config.plugin("checkpoint"), config.checkpoint.why(config.plugin("checkpoint"))) == (name, why)


def test_options_not_given_are_defaults() -> None:
    assert load().options("partition", "rows", Options) == Options()


def test_options_of_a_plugin_without_any() -> None:
    assert load().options("checkpoint", "plain", None) is None
    assert load(checkpoint={"plain": {}}).options("checkpoint", "plain", None) is None


def test_options_that_nobody_takes() -> None:
    with pytest.raises(ConfigError) as caught:
        load(checkpoint={"plain": {"writers": 4}}).options("checkpoint", "plain", None)
    assert str(caught.value) == (
        "checkpoint.plain: 'plain' takes no options, got writers\n"
        '  where: config dict\n  fix: remove "plain" from "checkpoint"'
    )


def test_problems_in_options() -> None:
    config = load(checkpoint={"sharded": {"writers": 0, "writer": 1}})
    with pytest.raises(ConfigError) as caught:
        config.options("checkpoint", "sharded", Options)
    assert str(caught.value) == (
        "2 problems in the configuration\n"
        "  checkpoint.sharded.writers: got 0, must be at least 1\n"
        "  checkpoint.sharded.writer: unknown key (its value is 1)\n"
        '    fix: did you mean "writers"?\n'
        "  where: config dict"
    )


def test_options_of_no_choice() -> None:
    with pytest.raises(TypeError, match="'fp16' is not a section that chooses a plugin"):
        load().options("fp16", "x", None)


def test_options_of_other_plugins_are_kept_unchecked() -> None:
    config = load(precision={"type": "fp8", "fp8": {"amax": 2}, "fp6": {"anything": [1]}})
    assert config.precision.options == {"fp8": {"amax": 2}, "fp6": {"anything": [1]}}


def test_copies() -> None:
    config = load(precision={"type": "fp8", "fp8": {"amax": 2}})
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert (other.raw, other.precision.options) == (config.raw, config.precision.options)
