"""What is said of unknown keys: the nearest key, the section that has it, or whose it may be; nothing silly."""

from __future__ import annotations

from typing import Any

import pytest

from ds_core.config import find_problems
from ds_core.config.paths import dotted
from ds_core.config.unknown import DROP_OTHERS, owners

REMOVE = f"remove it, or {DROP_OTHERS}"


def fix_of(config: dict[str, Any]) -> str | None:
    (problem,) = [each for each in find_problems(config) if each.text.startswith("unknown key")]
    return problem.fix


@pytest.mark.parametrize(
    "key",
    [
        *("msamp", "comms_config", "monitor_config", "_comment", "_zero_optimization", "zork", "a.b", "seed", "debug"),
        *("learning_rate", "output_dir", "num_train_epochs", "model", "dataset", "world_size", "local_rank"),
    ],
)
def test_a_key_of_another_tool_is_like_none_of_ours(key: str) -> None:
    assert fix_of({key: 1}) == REMOVE


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("zero_optimisation", "zero_optimization"),
        ("zero", "zero_optimization"),
        ("zerooptimization", "zero_optimization"),
        ("fp61", "fp16"),
        ("FP16", "fp16"),
        ("optimiser", "optimizer"),
        ("lr_scheduler", "scheduler"),
        ("grad_clip", "gradient_clipping"),
        ("clipping", "gradient_clipping"),
        ("micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("gradient_accumulation", "gradient_accumulation_steps"),
        ("tensor_board", "tensorboard"),
        ("activation_checkpoint", "activation_checkpointing"),
    ],
)
def test_a_slip_gets_the_key_that_was_meant(key: str, meant: str) -> None:
    assert fix_of({key: 1}) == f'did you mean "{meant}"?'


@pytest.mark.parametrize(
    ("config", "home"),
    [
        ({"stage": 2}, 'under "zero_optimization"'),
        ({"lr": 0.1}, 'under "optimizer.params"'),
        ({"eigenvalue": {}}, 'under "quantize_training"'),
        ({"zero_optimization": {"fp16": {}}}, "at the top level"),
        ({"zero_optimization": {"optimizer": {}}}, "at the top level"),
        ({"optimizer": {"type": "Adam", "params": {"gradient_clipping": 1}}}, "at the top level"),
    ],
)
def test_a_key_that_belongs_elsewhere(config: dict[str, Any], home: str) -> None:
    assert fix_of(config) == f"it belongs {home}"


def test_a_key_of_the_same_section_is_nearer_than_one_of_another() -> None:
    assert owners("max_batch_size") == ("data_efficiency.data_sampling.dynamic_batching",)
    assert fix_of({"elasticity": {"max_batch_size": 8}}) == 'did you mean "max_train_batch_size"?'


def test_few_keys_are_listed() -> None:
    assert fix_of({"csv_monitor": {"folder": "x"}}) == f"use one of enabled, job_name, output_path; or {DROP_OTHERS}"


def test_arguments_are_not_dropped_in_compatibility_mode_and_nobody_says_so() -> None:
    assert fix_of({"optimizer": {"type": "Lion", "params": {"zork": 1}}}) == (
        "use one of betas, fp32_optimizer_states, lr, set_grad_none, weight_decay"
    )
    assert fix_of({"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}}) == 'did you mean "lr"?'


def test_a_dotted_key_of_ours() -> None:
    fix = fix_of({"zero_optimization.stage": 2})
    assert fix == f'dots do not nest: write "zero_optimization": {{"stage": 2}}, or {DROP_OTHERS}'


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (("a", 1, "b"), "a[1].b"),
        (("a.b", "c"), '"a.b".c'),
        (("fp16 ",), '"fp16 "'),
        (("", "x"), '"".x'),
        (("a\nb",), '"a\\nb"'),
        (("é-1",), "é-1"),
    ],
)
def test_dotted(path: tuple[str | int, ...], text: str) -> None:
    assert dotted(path) == text
