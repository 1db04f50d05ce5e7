"""Keys that change nothing are listed with their reason, whatever the reason is."""

import pytest

from ds_core.config import load_config
from ds_core.config.effects import without_effect

BATCH = {"train_batch_size": 4}
OPTIMIZER = {"type": "AdamW", "params": {"lr": 0.1}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"gradient_clipping": 0.5, "optimizer": OPTIMIZER}, {}),
        ({"fp16": {"enabled": False, "loss_scale": 4}}, {"fp16.loss_scale": "not enabled"}),
        (
            {"fp16": {"enabled": True, "loss_scale": 4, "hysteresis": 3}},
            {"fp16.hysteresis": "loss_scale is constant"},
        ),
        ({"fp16": {"enabled": True, "hysteresis": 3}}, {}),
        ({"precision": {"type": "fp16"}, "fp16": {"hysteresis": 3}}, {}),
        (
            {"zero_optimization": {"stage": 0, "reduce_bucket_size": 5, "leaf_module": {"names": ["x"]}}},
            {
                "zero_optimization.reduce_bucket_size": "zero_optimization.stage is 0",
                "zero_optimization.leaf_module.names": "zero_optimization.stage is 0",
            },
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5, "stage3_max_live_parameters": 5}},
            {"zero_optimization.stage3_max_live_parameters": "only stage 3 reads it"},
        ),
        (
            {"zero_optimization": {"stage": 3, "allgather_bucket_size": 6, "max_live_parameters": 5}},
            {"zero_optimization.allgather_bucket_size": "only stages 1 and 2 read it"},
        ),
        ({"zero_allow_untested_optimizer": True}, {"zero_allow_untested_optimizer": "every optimizer is allowed"}),
        ({"zero_force_ds_cpu_optimizer": False}, {"zero_force_ds_cpu_optimizer": "nothing is offloaded"}),
        (
            {
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                "zero_force_ds_cpu_optimizer": False,
            },
            {},
        ),
        ({"checkpoint": {"sharded": {"writers": 4}}}, {"checkpoint.sharded": '"sharded" was not chosen'}),
        ({"checkpoint": {"engine": "sharded", "sharded": {"writers": 4}}}, {}),
        (
            {"flops_profiler": {"enabled": False, "profile_step": 5}},
            {"flops_profiler.profile_step": "not enabled"},
        ),
        (
            {"elasticity": {"enabled": False, "max_train_batch_size": 5}},
            {"elasticity.max_train_batch_size": "not enabled"},
        ),
    ],
)
def test_reasons(config, expected):
    found = without_effect(load_config({**BATCH, **config}))
    assert found == {path: f"no effect: {why}" for path, why in expected.items()}


def test_activation_checkpointing_says_who_reads_it():
    config = load_config({**BATCH, "activation_checkpointing": {"partition_activations": True}})
    assert "configure" in without_effect(config)["activation_checkpointing.partition_activations"]


def test_what_compatibility_mode_dropped():
    found = without_effect(load_config({**BATCH, "zork": 1}, compatible=True))
    assert found == {"zork": "ignored in compatibility mode, as DeepSpeed does"}
