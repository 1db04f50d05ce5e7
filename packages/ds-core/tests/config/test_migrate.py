"""Deprecated keys: read as today's, told once, and a problem where they contradict."""

import copy

import pytest

from ds_core.config import find_problems, load_config
from ds_core.config.migrate import DEPRECATED, Renamed, migrate

ZERO = "zero_optimization"
CPU = {"device": "cpu"}

REWRITTEN = [
    ({ZERO: {"stage": 2, "cpu_offload": True}}, {ZERO: {"stage": 2, "offload_optimizer": CPU}}),
    ({ZERO: {"stage": 2, "cpu_offload": False}}, {ZERO: {"stage": 2}}),
    ({ZERO: {"stage": 2, "cpu_offload": "auto"}}, {ZERO: {"stage": 2}}),
    ({ZERO: {"stage": 3, "cpu_offload_param": True}}, {ZERO: {"stage": 3, "offload_param": CPU}}),
    (
        {ZERO: {"stage": 3, "cpu_offload": True, "offload_optimizer": None}},
        {ZERO: {"stage": 3, "offload_optimizer": CPU}},
    ),
    ({ZERO: {"cpu_offload_use_pin_memory": True}}, {ZERO: {}}),
    ({"inference": {"replace_method": "module"}}, {"inference": {}}),
    (
        {ZERO: {"stage3_gather_fp16_weights_on_model_save": True}},
        {ZERO: {"stage3_gather_16bit_weights_on_model_save": True}},
    ),
    ({"bfloat16": {"enabled": True}}, {"bf16": {"enabled": True}}),
    ({"bf16": {"check_overflow": False}}, {"bf16": {"check_grad_overflow": False}}),
    ({"bfloat16": {"check_overflow": False}}, {"bf16": {"check_grad_overflow": False}}),
    ({ZERO: True}, {ZERO: {"stage": 1}}),
    ({ZERO: True, "allgather_size": 5}, {ZERO: {"stage": 1, "allgather_bucket_size": 5}}),
    ({ZERO: False}, {ZERO: {"stage": 0}}),
]


@pytest.mark.parametrize(("old", "new"), REWRITTEN)
def test_rewritten(old, new):
    before = copy.deepcopy(old)
    result, renamed, problems = migrate(old)
    assert (result, problems) == (new, [])
    assert renamed
    assert old == before, "what was given is left as it is"
    assert migrate(result) == (new, [], []), "today's words stay"


def test_every_row_is_rewritten_above():
    written = {
        key
        for old, _ in REWRITTEN
        for name, value in old.items()
        for key in (name, *(value if isinstance(value, dict) else ()))
    }
    assert {row.old for row in DEPRECATED} <= written


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {ZERO: {"stage": 2, "cpu_offload": True, "offload_optimizer": CPU}},
            'zero_optimization.cpu_offload: its replacement, "offload_optimizer": {"device": "cpu"}, is given too',
        ),
        ({ZERO: {"cpu_offload": "yes"}}, 'zero_optimization.cpu_offload: got "yes", must be true or false'),
        ({"bf16": {}, "bfloat16": {"enabled": True}}, 'bfloat16: its replacement, "bf16", is given too'),
    ],
)
def test_contradictions(config, text):
    problems = find_problems(config)
    assert [str(problem) for problem in problems] == [text]


def test_what_is_not_an_object_is_left_to_the_checks():
    (problem,) = find_problems({ZERO: [1]})
    assert problem.path == ZERO
    (problem,) = find_problems({"bf16": "yes"})
    assert problem.path == "bf16"


def test_one_warning_per_old_key(caplog):
    config = {"train_batch_size": 1, "bfloat16": {"enabled": False}, ZERO: {"stage": 2, "cpu_offload": True}}
    with caplog.at_level("WARNING", logger="ds_core"):
        loaded = load_config(config)
    assert [record.message for record in caplog.records] == [
        'bfloat16 is deprecated: write "bf16"',
        'zero_optimization.cpu_offload is deprecated: write "offload_optimizer": {"device": "cpu"}',
    ]
    assert loaded.zero_optimization.offload_optimizer.device == "cpu"
    assert loaded.raw == config


def test_a_renamed_key_says_where_it_went():
    assert migrate({ZERO: {"cpu_offload": True}})[1] == [
        Renamed((ZERO, "cpu_offload"), (ZERO, "offload_optimizer"), '"offload_optimizer": {"device": "cpu"}')
    ]


def test_keys_of_inference_move_into_its_sections():
    given = {"inference": {"mp_size": 2, "moe": True, "expert_group": "g", "replace_method": "module"}}
    result, renamed, problems = migrate(given)
    assert result == {"inference": {"tensor_parallel": {"tp_size": 2}, "moe": {"enabled": True, "ep_group": "g"}}}
    assert [str(row) for row in renamed] == [
        "inference.replace_method is deprecated: remove it",
        'inference.mp_size is deprecated: write "tensor_parallel": {"tp_size": ...}',
        'inference.expert_group is deprecated: write "moe": {"ep_group": ...}',
    ]
    assert problems == []
    assert "mp_size" in given["inference"]


def test_a_key_of_inference_that_contradicts_its_replacement_is_left_to_the_checks():
    (problem,) = find_problems({"inference": {"mp_size": 2, "tp": {"tp_size": 1}}})
    assert str(problem) == 'inference.mp_size: got 2, but its replacement, "tp.tp_size", is 1'
