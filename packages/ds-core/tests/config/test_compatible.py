"""Compatibility mode: what DeepSpeed ignores is dropped with one warning; everything else stays an error."""

import pytest

from ds_core.config import ConfigError, examine, load_config

BATCH = {"train_batch_size": 4}


def warned(config, **arguments):
    examined = examine({**BATCH, **config}, dp_world_size=1, compatible=True, **arguments)
    assert examined.problems == ()
    return [problem.path for problem in examined.warnings]


@pytest.mark.parametrize(
    ("config", "paths"),
    [
        ({"zero_optimisation": {"stage": 2}}, ["zero_optimisation"]),
        ({"msamp": {"enabled": True}, "_comment": "x"}, ["msamp", "_comment"]),
        ({"zero_optimization.reduce_bucket_size": 0.5}, ['"zero_optimization.reduce_bucket_size"']),
        ({"fp16": {"enabld": True, "hysteresis": 3}}, ["fp16.enabld"]),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, ["zero_optimization.offload_param.devise"]),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, ["zero_optimization.offload_param"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["zero_optimization.offload_param"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "zork": 1}},
            ["zero_optimization.zork", "zero_optimization.offload_optimizer"],
        ),
    ],
)
def test_dropped(config, paths):
    assert sorted(warned(config)) == sorted(paths)
    with pytest.raises(ConfigError):
        load_config({**BATCH, **config})


def test_the_rest_of_the_section_holds():
    assert load_config({**BATCH, "fp16": {"enabld": True, "hysteresis": 3}}, compatible=True).fp16.hysteresis == 3


@pytest.mark.parametrize(
    ("given", "in_force"),
    [
        ({"engine": "async", "sharded": {"writers": 2}}, "async"),
        ({"writer": {"decoupled": True}, "sharded": {"a": 1}}, "async"),
    ],
)
def test_one_warning_for_options_that_nobody_reads(caplog, given, in_force):
    with caplog.at_level("WARNING", logger="ds_core"):
        load_config({"train_batch_size": 1, "checkpoint": given})
    assert [record.message for record in caplog.records] == [
        f'checkpoint.sharded: not read: "{in_force}" is in force, and its options are those in "checkpoint.{in_force}"'
    ]


def test_no_warning_for_options_that_are_read_or_empty(caplog):
    with caplog.at_level("WARNING", logger="ds_core"):
        load_config({"train_batch_size": 1, "checkpoint": {"engine": "async", "async": {"writers": 2}, "sharded": {}}})
    assert caplog.records == []


def test_one_warning_per_key(caplog):
    with caplog.at_level("WARNING", logger="ds_core"):
        config = load_config({**BATCH, "zork": 1, "fp16": {"enabeld": True}}, compatible=True)
    assert [record.message for record in caplog.records] == [
        "ignored in compatibility mode: zork: unknown key (its value is 1)",
        "ignored in compatibility mode: fp16.enabeld: unknown key (its value is true)",
    ]
    assert config.ignored == ("zork", "fp16.enabeld")


@pytest.mark.parametrize(
    "config",
    [
        {"fp16": {"enabled": "maybe"}},
        {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
        {"dump_state": True},
        {"zero_optimization": {"stage": 7}},
        {"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
        {"train_micro_batch_size_per_gpu": 3},
    ],
)
def test_what_deepspeed_does_not_ignore_stays_an_error(config):
    with pytest.raises(ConfigError):
        load_config({**BATCH, **config}, compatible=True)


@pytest.mark.parametrize(("value", "is_compatible"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_environment_chooses(monkeypatch, value, is_compatible):
    monkeypatch.setenv("DS_CONFIG_COMPATIBLE", value)
    assert bool(examine({"zork": 1}).warnings) is is_compatible
    assert not examine({"zork": 1}, compatible=False).warnings, "the argument wins"


def test_arguments_of_a_constructor_are_not_ignored_by_it():
    for section, type_name in (("optimizer", "AdamW"), ("scheduler", "WarmupLR")):
        with pytest.raises(ConfigError, match="zork") as caught:
            load_config({**BATCH, section: {"type": type_name, "params": {"zork": 1}}}, compatible=True)
        assert "DS_CONFIG_COMPATIBLE" not in caught.value.fix
    assert warned({"optimizer": {"type": "Muon", "params": {"zork": 1}}}) == ["optimizer.params.zork"]


def test_the_old_name_of_a_section_yields_to_the_new_one():
    examined = examine({**BATCH, "bfloat16": {"enabled": False}, "bf16": {"enabled": True}}, compatible=True)
    assert [str(problem) for problem in examined.warnings] == ['bfloat16: its replacement, "bf16", is given too']
    assert (examined.problems, examined.config.bf16.enabled, examined.config.ignored) == ((), True, ("bfloat16",))
    with pytest.raises(ConfigError, match="is given too"):
        load_config({**BATCH, "zero_optimization": {"cpu_offload": True, "offload_optimizer": {}}}, compatible=True)


def test_a_bad_value_in_the_environment(monkeypatch):
    monkeypatch.setenv("DS_CONFIG_COMPATIBLE", "maybe")
    with pytest.raises(ConfigError, match="allowed are 1 and 0"):
        examine({})


def test_what_was_given_is_left_as_it_is():
    config = {"fp16": {"enabld": True}, "train_batch_size": 4}
    assert load_config(config, compatible=True).raw == {"fp16": {"enabld": True}, "train_batch_size": 4}
    assert config == {"fp16": {"enabld": True}, "train_batch_size": 4}
