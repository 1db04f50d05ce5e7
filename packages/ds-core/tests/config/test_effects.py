"""Keys that change nothing are listed with their reason, whatever the reason is."""

import pytest

from ds_core import registry
from ds_core.config import CheckpointSection, Config, Fp16Section, OffloadParamSection, ZeroSection, load_config
from ds_core.config.effects import given_paths, state_of, without_effect
from ds_core.config.sections.compression import SparseAttentionSection
from ds_core.config.sections.inference import InferenceSection
from ds_core.config.sections.optimizer_arguments import AdamArguments
from ds_core.config.sections.profiling import FlopsProfilerSection, ThroughputTimerSection

BATCH = {"train_batch_size": 4}
SHARED = "ranks always share out what several of them hold"
BY_ENGINE = "how files are written is up to the engine, whose options are in checkpoint.sharded or checkpoint.async"
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
            {
                "zero_optimization.allgather_bucket_size": "weights are gathered in the buckets that gradients are "
                "reduced in: reduce_bucket_size"
            },
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
        (
            {"checkpoint": {"engine": "plain", "sharded": {"writers": 4}}},
            {"checkpoint.sharded": '"sharded" was not chosen; its keys are unchecked'},
        ),
        ({"checkpoint": {"engine": "sharded", "sharded": {"writers": 4}}}, {}),
        (
            {"checkpoint": {"parallel_write": {"pipeline_stage": True}}},
            {"checkpoint.parallel_write.pipeline_stage": SHARED},
        ),
        (
            {"checkpoint": {"checkpoint_serialization": False}},
            {"checkpoint.checkpoint_serialization": "nothing is pickled, so there is no format to choose"},
        ),
        ({"checkpoint": {"load_universal": True}}, {}),
        (
            {"checkpoint": {"writer": {"type": "python", "io_multiplier": 2, "decoupled": True}}},
            {
                "checkpoint.writer.type": BY_ENGINE,
                "checkpoint.writer.io_multiplier": (
                    "every rank writes its part, in as many threads as writers in the section of the engine says"
                ),
            },
        ),
        (
            {"checkpoint": {"engine": "plain", "writer": {"decoupled": True, "io_buffer_size": 4096}}},
            {
                "checkpoint.writer.decoupled": "checkpoint.engine is given",
                "checkpoint.writer.io_buffer_size": BY_ENGINE,
            },
        ),
        ({"partition": {"replicated": {"bucket_bytes": 4}}}, {}),
        (
            {"partition": {"replicated": {"bucket_bytes": 4}}, "zero_optimization": {"stage": 2}},
            {"partition.replicated": '"replicated" was not chosen; its keys are unchecked'},
        ),
        ({"precision": {"fp16": {}}, "fp16": {"enabled": True}}, {}),
        (
            {"precision": {"fp16": {}}},
            {"precision.fp16": '"fp16" was not chosen; its keys are unchecked'},
        ),
        (
            {"optimizer": {"type": "ADAM", "params": {"lr": 0.1, "torch_adam": True, "adam_w_mode": False}}},
            {"optimizer.params.torch_adam": "Adam and AdamW are torch's in any case"},
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}},
            {"optimizer.params.adam_w_mode": '"AdamW" stays AdamW, as in DeepSpeed'},
        ),
        ({"optimizer": {"type": "SGD", "params": {"torch_adam": True}}}, {}),
        (
            {"timers": {"throughput": {"enabled": False}}},
            {"timers.throughput.enabled": "what reads it comes with a later release of ds-core"},
        ),
        ({"weight_quantization": {"enabled": False, "q_groups": 4}}, {"weight_quantization.q_groups": "not enabled"}),
        (
            {"weight_quantization": {"enabled": True, "q_groups": 1}},
            {"weight_quantization.q_groups": "what reads it comes with a later release of ds-inference"},
        ),
        (
            {"aio": {"queue_depth": 16, "single_submit": True}},
            {
                "aio.queue_depth": "nothing is offloaded to files",
                "aio.single_submit": "nothing is offloaded to files",
            },
        ),
        (
            {
                "aio": {"thread_count": 2},
                "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/fast"}},
            },
            {},
        ),
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


@pytest.mark.parametrize("is_there", [True, False])
def test_flags_of_activation_checkpointing_say_who_reads_them(monkeypatch, is_there):
    names = registry.names
    monkeypatch.setattr(
        registry, "names", lambda seam: ("deepspeed",) * is_there if seam == "activation" else names(seam)
    )
    found = without_effect(load_config({**BATCH, "activation_checkpointing": {"cpu_checkpointing": True}}))
    assert ("ds-activation" in found.get("activation_checkpointing.cpu_checkpointing", "")) is not is_there


def test_what_compatibility_mode_dropped():
    found = without_effect(load_config({**BATCH, "zork": 1}, compatible=True))
    assert found == {"zork": "ignored in compatibility mode"}


def test_given_paths_are_in_deepspeeds_words():
    config = load_config(
        {
            **BATCH,
            "optimizer": OPTIMIZER,
            "zero_optimization": {"reduce_bucket_numel": 5, "leaf_module": {"names": "x"}},
            "timers": {"throughput": {"enabled": True}},
        }
    )
    assert given_paths(config) == [
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        *("optimizer.type", "optimizer.params"),
        *("zero_optimization.reduce_bucket_size", "zero_optimization.leaf_module.names"),
        "timers.throughput.enabled",
    ]


@pytest.mark.parametrize(
    ("section", "field", "state"),
    [
        (Config, "steps_per_print", "effective"),
        (Config, "dump_state", "not built: only `false`"),
        (Config, "sequence_parallel_size", "not built: only `null` or `1`"),
        (Config, "disable_allgather", "no effect: DeepSpeed's engine reads it nowhere either"),
        (CheckpointSection, "tag_validation", "effective"),
        (ZeroSection, "reduce_bucket_numel", "needs ds-zero"),
        (ZeroSection, "sub_group_numel", "needs ds-zero; no effect where only stage 3 reads it"),
        (OffloadParamSection, "device", "needs ds-zero"),
        (ZeroSection, "legacy_stage1", "not built: only `false`"),
        (Fp16Section, "loss_scale", "needs ds-fp16"),
        (Fp16Section, "hysteresis", "needs ds-fp16; no effect where loss_scale is constant"),
        (FlopsProfilerSection, "enabled", "not built"),
        (ThroughputTimerSection, "enabled", "not built"),
        (InferenceSection, "mp_size", "deprecated"),
        (AdamArguments, "lr", "effective"),
    ],
)
def test_state_of(section, field, state):
    assert state_of(section, field) == state


def test_state_of_a_section_without_effect():
    assert state_of(SparseAttentionSection, "block").startswith("no effect: it is only kept for the model")
