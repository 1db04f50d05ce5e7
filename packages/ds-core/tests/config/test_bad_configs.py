"""Bad configurations and the whole error of each: nothing but these lines may reach a user."""

# ruff: noqa: E501 - a line of a message stands here as users see it

from __future__ import annotations

from typing import Any

import pytest

from ds_core.config import ConfigError, find_problems, load_config

BATCH = {"train_batch_size": 4}
RANKS = 2

CASES: list[tuple[str, dict[Any, Any], list[str]]] = [
    (
        "misspelt section",
        {**BATCH, "zero_optimisation": {"stage": 2}},
        [
            'zero_optimisation: unknown key (its value is {"stage": 2})',
            '  fix: did you mean "zero_optimization"?',
        ],
    ),
    (
        "misspelt top-level key",
        {"train_batchsize": 4},
        [
            "2 problems in the configuration",
            "  train_batchsize: unknown key (its value is 4)",
            '    fix: did you mean "train_batch_size"?',
            "  train_batch_size: is missing, and so is train_micro_batch_size_per_gpu",
            '    fix: give one of them, such as "train_micro_batch_size_per_gpu": 1',
        ],
    ),
    (
        "wrong case",
        {**BATCH, "Gradient_Clipping": 1},
        [
            "Gradient_Clipping: unknown key (its value is 1)",
            '  fix: did you mean "gradient_clipping"?',
        ],
    ),
    (
        "nothing like it",
        {**BATCH, "_comment": "mine"},
        [
            '_comment: unknown key (its value is "mine")',
            '  fix: did you mean "comet"?',
        ],
    ),
    (
        "dotted key",
        {**BATCH, "zero_optimization.reduce_bucket_size": 5},
        [
            '"zero_optimization.reduce_bucket_size": unknown key (its value is 5)',
            '  fix: did you mean "zero_optimization"?',
        ],
    ),
    (
        "key of a section at the top",
        {**BATCH, "stage": 2},
        [
            "stage: unknown key (its value is 2)",
            '  fix: it belongs under "zero_optimization"',
        ],
    ),
    (
        "key of two sections at the top",
        {**BATCH, "device": "cpu"},
        [
            'device: unknown key (its value is "cpu")',
            '  fix: it belongs under "zero_optimization.offload_param" or under "zero_optimization.offload_optimizer"',
        ],
    ),
    (
        "top-level key in a section",
        {**BATCH, "zero_optimization": {"gradient_clipping": 1}},
        [
            "zero_optimization.gradient_clipping: unknown key (its value is 1)",
            "  fix: it belongs at the top level",
        ],
    ),
    (
        "optimizer argument at the top",
        {**BATCH, "lr": 0.1},
        [
            "lr: unknown key (its value is 0.1)",
            '  fix: it belongs under "optimizer.params"',
        ],
    ),
    (
        "optimizer argument beside params",
        {**BATCH, "optimizer": {"type": "Adam", "lr": 0.1}},
        [
            "optimizer.lr: unknown key (its value is 0.1)",
            '  fix: it belongs under "optimizer.params"',
        ],
    ),
    (
        "schedule argument beside params",
        {**BATCH, "scheduler": {"type": "WarmupLR", "warmup_num_steps": 10}},
        [
            "scheduler.warmup_num_steps: unknown key (its value is 10)",
            '  fix: it belongs under "scheduler.params"',
        ],
    ),
    (
        "misspelt key in a section",
        {**BATCH, "fp16": {"enabeld": True}},
        [
            "fp16.enabeld: unknown key (its value is true)",
            '  fix: did you mean "enabled"?',
        ],
    ),
    (
        "misspelt key two deep",
        {**BATCH, "zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}},
        [
            'zero_optimization.offload_optimizer.devise: unknown key (its value is "cpu")',
            '  fix: did you mean "device"?',
        ],
    ),
    (
        "few keys to choose from",
        {**BATCH, "csv_monitor": {"folder": "x"}},
        [
            'csv_monitor.folder: unknown key (its value is "x")',
            "  fix: allowed are enabled, job_name, output_path",
        ],
    ),
    (
        "key that is not text",
        {**BATCH, 3: 4},
        [
            "3: a key must be text, got 3",
            '  fix: write it as "3"',
        ],
    ),
    (
        "key in a section that is not text",
        {**BATCH, "fp16": {3: 4}},
        [
            "fp16.3: a key must be text",
            '  fix: put it in quotes: "..."',
        ],
    ),
    (
        "text for a number",
        {**BATCH, "gradient_clipping": "high"},
        [
            'gradient_clipping: got "high", must be a finite number',
        ],
    ),
    (
        "bool for a number",
        {**BATCH, "gradient_clipping": True},
        [
            "gradient_clipping: got true, must be a finite number",
        ],
    ),
    (
        "infinity",
        {**BATCH, "gradient_clipping": float("inf")},
        [
            "gradient_clipping: got inf, must be a finite number",
        ],
    ),
    (
        "fraction for a whole number",
        {**BATCH, "steps_per_print": 1.5},
        [
            "steps_per_print: got 1.5, must be a whole number",
        ],
    ),
    (
        "bool for a whole number",
        {**BATCH, "zero_optimization": {"stage": True}},
        [
            "zero_optimization.stage: got true, must be a whole number",
        ],
    ),
    (
        "null for a whole number",
        {**BATCH, "zero_optimization": {"stage": None}},
        [
            "zero_optimization.stage: got null, must be a whole number",
        ],
    ),
    (
        "number for a bool",
        {**BATCH, "dataloader_drop_last": 7},
        [
            "dataloader_drop_last: got 7, must be true or false",
        ],
    ),
    (
        "list for a section",
        {**BATCH, "fp16": [True]},
        [
            "fp16: got [true], must be an object { ... }",
        ],
    ),
    (
        "bool for a section",
        {**BATCH, "bf16": True},
        [
            "bf16: got true, must be an object { ... }",
        ],
    ),
    (
        "text for a section",
        {**BATCH, "optimizer": "Adam"},
        [
            'optimizer: got "Adam", must be an object { ... }',
        ],
    ),
    (
        "number for text",
        {**BATCH, "optimizer": {"type": 3}},
        [
            "optimizer.type: got 3, must be text",
        ],
    ),
    (
        "empty name",
        {**BATCH, "scheduler": {"type": ""}},
        [
            'scheduler.type: got "", must not be empty',
        ],
    ),
    (
        "params are a list",
        {**BATCH, "optimizer": {"type": "Adam", "params": [1]}},
        [
            "optimizer.params: got [1], must be an object { ... }",
        ],
    ),
    (
        "number in a list of names",
        {**BATCH, "torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear", 3]}},
        [
            "torch_autocast.lower_precision_safe_modules[1]: got 3, must be text",
        ],
    ),
    (
        "out of both bounds",
        {**BATCH, "zero_optimization": {"stage": 4}},
        [
            "zero_optimization.stage: got 4, allowed are 0 to 3",
        ],
    ),
    (
        "below",
        {**BATCH, "zero_optimization": {"reduce_bucket_size": -1}},
        [
            "zero_optimization.reduce_bucket_size: got -1, must be at least 0",
        ],
    ),
    (
        "negative scale",
        {**BATCH, "fp16": {"loss_scale": -1.0}},
        [
            "fp16.loss_scale: got -1.0, must be at least 0",
        ],
    ),
    (
        "infinite scale",
        {**BATCH, "fp16": {"loss_scale": float("inf")}},
        [
            "fp16.loss_scale: got inf, must be a finite number",
        ],
    ),
    (
        "zero window",
        {**BATCH, "fp16": {"enabled": True, "loss_scale_window": 0}},
        [
            "fp16.loss_scale_window: got 0, must be at least 1",
            "  fix: write 1 or more, or remove it",
        ],
    ),
    (
        "ratio above one",
        {**BATCH, "zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 1.5}}},
        [
            "zero_optimization.offload_optimizer.ratio: got 1.5, allowed are 0 to 1",
        ],
    ),
    (
        "misspelt choice",
        {**BATCH, "log_level": "warn"},
        [
            'log_level: got "warn", allowed are "debug", "info", "warning", "error" or "critical"',
            '  fix: did you mean "warning"?',
        ],
    ),
    (
        "unknown choice",
        {**BATCH, "zero_optimization": {"offload_param": {"device": "disk"}}},
        [
            'zero_optimization.offload_param.device: got "disk", allowed are "none", "cpu" or "nvme"',
        ],
    ),
    (
        "unknown dtype",
        {**BATCH, "torch_autocast": {"enabled": True, "dtype": "int8"}},
        [
            'torch_autocast.dtype: got "int8", allowed are "float16", "bfloat16" or "float32"',
        ],
    ),
    (
        "bad tag validation",
        {**BATCH, "checkpoint": {"tag_validation": "warm"}},
        [
            'checkpoint.tag_validation: got "warm", allowed are "Warn", "Ignore" or "Fail"',
            '  fix: did you mean "Warn"?',
        ],
    ),
    (
        "missing name",
        {**BATCH, "optimizer": {"params": {"lr": 1}}},
        [
            "optimizer.type: is missing",
            '  fix: add "type"',
        ],
    ),
    (
        "auto for a name",
        {**BATCH, "optimizer": {"type": "auto"}},
        [
            'optimizer.type: "auto" was not replaced by a value',
            "  fix: give a value, or remove the key",
        ],
    ),
    (
        "steps per print zero",
        {**BATCH, "steps_per_print": 0},
        [
            "steps_per_print: got 0, must be at least 1",
        ],
    ),
    (
        "alias and field",
        {**BATCH, "zero_optimization": {"stage3_max_live_parameters": 1, "max_live_parameters": 2}},
        [
            'zero_optimization.max_live_parameters: "stage3_max_live_parameters", given too, means the same',
            "  fix: keep one of the two",
        ],
    ),
    (
        "two names of a section",
        {**BATCH, "bf16": {}, "bfloat16": {}},
        [
            'bfloat16: "bf16", given too, means the same',
            "  fix: keep one of the two",
        ],
    ),
    (
        "deprecated and new key",
        {**BATCH, "zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
        [
            'zero_optimization.cpu_offload: its replacement, "offload_optimizer": {"device": "cpu"}, is given too',
            "  fix: remove the old key",
        ],
    ),
    (
        "deprecated key of a wrong type",
        {**BATCH, "zero_optimization": {"cpu_offload": "cpu"}},
        [
            'zero_optimization.cpu_offload: got "cpu", must be true or false',
            '  fix: write "offload_optimizer": {"device": "cpu"} instead',
        ],
    ),
    (
        "key not built",
        {**BATCH, "prescale_gradients": True},
        [
            "prescale_gradients: got true, which is not built yet; only false is accepted",
            "  fix: remove it",
        ],
    ),
    (
        "caller-owned accumulation",
        {**BATCH, "managed_gradient_accumulation": False},
        [
            "managed_gradient_accumulation: got false, which is not built yet; only true is accepted",
            "  fix: remove it",
        ],
    ),
    (
        "sum of gradients",
        {**BATCH, "gradient_allreduce_op": "SUM"},
        [
            'gradient_allreduce_op: got "SUM", which is not built yet; only "mean" is accepted',
            "  fix: remove it",
        ],
    ),
    (
        "communication dtype",
        {**BATCH, "communication_data_type": "fp61"},
        [
            'communication_data_type: got "fp61", allowed are "float16", "bfloat16" or "float32"',
        ],
    ),
    (
        "communication dtype of sequences",
        {**BATCH, "seq_parallel_communication_data_type": "bf16"},
        [
            'seq_parallel_communication_data_type: got "bf16", which is not built yet; only "float32" is accepted',
            "  fix: remove it",
        ],
    ),
    (
        "unknown dtypes of data",
        {**BATCH, "data_types": {"grad_accum_dtype": "int8", "buffer_dtype": 16, "grad_dtype": "fp32"}},
        [
            "3 problems in the configuration",
            '  data_types.grad_accum_dtype: got "int8", allowed are "float16", "bfloat16" or "float32"',
            '  data_types.buffer_dtype: got 16, allowed are "float16", "bfloat16" or "float32"',
            '  data_types.grad_dtype: unknown key (its value is "fp32")',
            '    fix: did you mean "grad_accum_dtype"?',
        ],
    ),
    (
        "sequence parallel",
        {**BATCH, "sequence_parallel_size": 2},
        [
            "sequence_parallel_size: got 2, which is not built yet; only null or 1 is accepted",
            "  fix: remove it",
        ],
    ),
    (
        "legacy size alone",
        {**BATCH, "allgather_size": 100},
        [
            'allgather_size: got 100, which is read only beside the legacy form "zero_optimization": true; only 500000000 is accepted',
            "  fix: remove it",
        ],
    ),
    (
        "legacy stage 1",
        {**BATCH, "zero_optimization": {"stage": 1, "legacy_stage1": True}},
        [
            "zero_optimization.legacy_stage1: got true, which was removed from DeepSpeed; only false is accepted",
            "  fix: remove it",
        ],
    ),
    (
        "node-local storage",
        {**BATCH, "checkpoint": {"use_node_local_storage": True}},
        [
            "checkpoint.use_node_local_storage: got true, which is not built yet; only false is accepted",
            "  fix: remove it",
        ],
    ),
    (
        "fast writer",
        {**BATCH, "checkpoint": {"writer": {"type": "FAST"}}},
        [
            'checkpoint.writer: got {"type": "FAST"}, which is not built yet; only null or {} is accepted',
            "  fix: remove it",
        ],
    ),
    (
        "parallel write",
        {**BATCH, "checkpoint": {"parallel_write": {"pipeline_stage": True}}},
        [
            "checkpoint.parallel_write.pipeline_stage: got true, which is not built yet; only false is accepted",
            "  fix: remove it",
        ],
    ),
    (
        "section not built",
        {**BATCH, "tensorboard": {"enabled": True}},
        [
            "tensorboard: this section is not built yet; it comes with a later release of ds-core",
            '  fix: remove "tensorboard", or set its "enabled" to false',
        ],
    ),
    (
        "section not built without enabled",
        {**BATCH, "activation_checkpointing": {"partition_activations": True}},
        [
            "activation_checkpointing: this section is not built yet; it comes with a later release of ds-activation",
            '  fix: remove "activation_checkpointing"',
        ],
    ),
    (
        "section not built, deep",
        {**BATCH, "data_efficiency": {"data_sampling": {"curriculum_learning": {"enabled": True}}}},
        [
            "data_efficiency: this section is not built yet; it comes with a later release of ds-core",
            '  fix: remove "data_efficiency"',
        ],
    ),
    (
        "near miss of the chosen engine",
        {**BATCH, "checkpoint": {"engine": "sharded", "shraded": {"writers": 4}}},
        [
            "checkpoint.shraded: no plugin is called so",
            '  fix: did you mean "sharded"?',
        ],
    ),
    (
        "near miss of a key",
        {**BATCH, "checkpoint": {"parallel_writes": {"pipeline_stage": False}}},
        [
            "checkpoint.parallel_writes: no plugin is called so",
            '  fix: did you mean "parallel_write"?',
        ],
    ),
    (
        "value beside sub-sections",
        {**BATCH, "checkpoint": {"load_univeral": True}},
        [
            "checkpoint.load_univeral: unknown key (its value is true)",
            '  fix: did you mean "load_universal"?',
        ],
    ),
    (
        "fp16 and bf16",
        {**BATCH, "fp16": {"enabled": True}, "bf16": {"enabled": True}},
        [
            "fp16.enabled: got true, and bf16.enabled is true as well",
            "  fix: enable one of the two, bf16 if the device has it",
        ],
    ),
    (
        "own precision and fp16",
        {**BATCH, "precision": {"type": "fp8"}, "fp16": {"enabled": True}},
        [
            'precision.type: got "fp8", and fp16.enabled is true as well',
            '  fix: remove "type" from "precision", or set "enabled" of "fp16" to false',
        ],
    ),
    (
        "own partition and ZeRO",
        {**BATCH, "partition": {"type": "rows"}, "zero_optimization": {"stage": 2}},
        [
            'partition.type: got "rows", and zero_optimization.stage is 2',
            '  fix: remove "type" from "partition", or set "stage" to 0',
        ],
    ),
    (
        "partial offload below stage 3",
        {**BATCH, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        [
            "zero_optimization.offload_optimizer.ratio: got 0.5, below 1 is possible at stage 3 only, not at stage 2",
            '  fix: set "ratio" to 1, or "stage" to 3',
        ],
    ),
    (
        "max_grad_norm",
        {**BATCH, "optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}},
        [
            "optimizer.params.max_grad_norm: is not an argument of the optimizer",
            '  fix: write it as "gradient_clipping" at the top level',
        ],
    ),
    (
        "auto batch sizes",
        {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"},
        [
            "3 problems in the configuration",
            '  train_batch_size: "auto" was not replaced by a value',
            "    fix: give a number",
            '  train_micro_batch_size_per_gpu: "auto" was not replaced by a value',
            "    fix: give a number",
            '  gradient_accumulation_steps: "auto" was not replaced by a value',
            "    fix: give a number",
        ],
    ),
    (
        "auto parameters",
        {
            **BATCH,
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, "auto"]}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        },
        [
            "3 problems in the configuration",
            '  optimizer.params.lr: "auto" was not replaced by a value',
            "    fix: give a value, or remove the key",
            '  optimizer.params.betas[1]: "auto" was not replaced by a value',
            "    fix: give a value, or remove the key",
            '  scheduler.params.warmup_num_steps: "auto" was not replaced by a value',
            "    fix: give a value, or remove the key",
        ],
    ),
    (
        "no batch size",
        {},
        [
            "train_batch_size: is missing, and so is train_micro_batch_size_per_gpu",
            '  fix: give one of them, such as "train_micro_batch_size_per_gpu": 1',
        ],
    ),
    (
        "accumulation alone",
        {"gradient_accumulation_steps": 2},
        [
            "train_batch_size: is missing, and so is train_micro_batch_size_per_gpu",
            '  fix: give one of them, such as "train_micro_batch_size_per_gpu": 1',
        ],
    ),
    (
        "zero batch",
        {"train_batch_size": 0},
        [
            "train_batch_size: got 0, must be at least 1",
        ],
    ),
    (
        "fractional batch",
        {"train_micro_batch_size_per_gpu": 1.5},
        [
            "train_micro_batch_size_per_gpu: got 1.5, must be a whole number",
        ],
    ),
    (
        "bool batch",
        {"train_micro_batch_size_per_gpu": True},
        [
            "train_micro_batch_size_per_gpu: got true, must be a whole number",
        ],
    ),
    (
        "does not divide by ranks",
        {"train_batch_size": 7},
        [
            "train_batch_size: 7 cannot be train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks = ? x 1 x 2, a multiple of 2",
            "  fix: set train_batch_size to 6 or 8",
        ],
    ),
    (
        "smaller than the ranks",
        {"train_batch_size": 1},
        [
            "train_batch_size: 1 cannot be train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks = ? x 1 x 2, a multiple of 2",
            "  fix: set train_batch_size to 2",
        ],
    ),
    (
        "does not divide by micro",
        {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 5},
        [
            "train_batch_size: 24 cannot be train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks = 5 x ? x 2, a multiple of 10",
            "  fix: set train_batch_size to 20 or 30, or set train_micro_batch_size_per_gpu to 4",
        ],
    ),
    (
        "does not divide by accumulation",
        {"train_batch_size": 24, "gradient_accumulation_steps": 5},
        [
            "train_batch_size: 24 cannot be train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks = ? x 5 x 2, a multiple of 10",
            "  fix: set train_batch_size to 20 or 30, or set gradient_accumulation_steps to 6",
        ],
    ),
    (
        "contradiction",
        {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2},
        [
            "train_batch_size: 24 is not train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks = 3 x 2 x 2 = 12",
            "  fix: set train_batch_size to 12, or set train_micro_batch_size_per_gpu to 6, or set gradient_accumulation_steps to 4, or run on 4 ranks, or leave out train_batch_size",
        ],
    ),
    (
        "many",
        {
            "train_batch_size": 7,
            "stage": 1,
            "fp16": {"enabled": True, "loss_scale": -1},
            "bf16": {"enabled": 1, "x": 2},
            "sparse_gradients": True,
            "wandb": {"enabled": True},
            "partition": {"type": "rows"},
            "zero_optimization": {"stage": 1},
        },
        [
            "7 problems in the configuration",
            "  wandb: this section is not built yet; it comes with a later release of ds-core",
            '    fix: remove "wandb", or set its "enabled" to false',
            "  stage: unknown key (its value is 1)",
            '    fix: it belongs under "zero_optimization"',
            "  train_batch_size: 7 cannot be train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks = ? x 1 x 2, a multiple of 2",
            "    fix: set train_batch_size to 6 or 8",
            "  sparse_gradients: got true, which is not built yet; only false is accepted",
            "    fix: remove it",
            "  fp16.loss_scale: got -1, must be at least 0",
            "  bf16.x: unknown key (its value is 2)",
            "    fix: allowed are auto_cast, bf16_master_weights_and_grads, bf16_optimizer_states, check_grad_overflow, check_overflow, enabled, immediate_grad_update",
            '  partition.type: got "rows", and zero_optimization.stage is 1',
            '    fix: remove "type" from "partition", or set "stage" to 0',
        ],
    ),
]


@pytest.mark.parametrize(("config", "lines"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_error(config: dict[Any, Any], lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config, dp_world_size=RANKS)
    assert caught.value.where == "config dict"
    assert [line for line in str(caught.value).split("\n") if line != "  where: config dict"] == lines


@pytest.mark.parametrize("config", [case[1] for case in CASES], ids=[case[0] for case in CASES])
def test_no_error_inside_the_error(config: dict[Any, Any]) -> None:
    # Someone who reads the traceback must not meet pydantic's exception as its cause or context.
    with pytest.raises(ConfigError) as caught:
        load_config(config, dp_world_size=RANKS)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize("config", [case[1] for case in CASES], ids=[case[0] for case in CASES])
def test_find_problems_agrees(config: dict[Any, Any]) -> None:
    problems = find_problems(config, dp_world_size=RANKS)
    with pytest.raises(ConfigError) as caught:
        load_config(config, dp_world_size=RANKS)
    for problem in problems:
        assert f"{problem.path}: {problem.text}" in caught.value.what
    assert len(problems) == sum(": " in line and not line.startswith("    ") for line in caught.value.what.split("\n"))
