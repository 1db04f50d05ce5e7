"""The engine's getters of the configuration: every name of DeepSpeed's, against values that are not the defaults."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ds_core
from ds_core.config import Config, ZeroSection, load_config
from ds_core.config.catalog import rare_section
from ds_core.engine.config_getters import ONE_FOR_EACH_KEY, ConfigGetters
from ds_core.engine.face import EngineFace
from ds_core.engine.zero_getters import ZeroGetters
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here

CURRICULUM = {
    "enabled": True,
    "curriculum_metrics": {
        "length": {
            "difficulty_type": "value",
            "min_difficulty": 1,
            "max_difficulty": 9,
            "schedule_type": "fixed_root",
            "schedule_config": {"total_curriculum_step": 5, "difficulty_step": 2, "root_degree": 2},
        }
    },
}
LEGACY_CURRICULUM = {
    "enabled": True,
    "curriculum_type": "seqlen",
    "min_difficulty": 8,
    "max_difficulty": 64,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 5, "difficulty_step": 2},
}
RARE: dict[str, dict[str, Any]] = {
    "aio": {"block_size": 4096, "queue_depth": 3},
    "amp": {"enabled": True, "opt_level": "O2"},
    "autotuning": {"enabled": True, "fast": False, "metric": "latency", "mp_size": 3},
    "curriculum_learning": LEGACY_CURRICULUM,
    "data_efficiency": {
        "data_sampling": {"curriculum_learning": CURRICULUM},
        "data_routing": {"random_ltd": {"enabled": True, "total_layer_num": 12}},
    },
    "elasticity": {"enabled": True, "max_train_batch_size": 64, "micro_batch_sizes": [2]},
    "flops_profiler": {"enabled": True, "profile_step": 5, "output_file": "flops.txt", "detailed": False},
    "progressive_layer_drop": {"enabled": True, "theta": 0.5, "gamma": 0.01},
    "tensor_parallel": {"autotp_size": 2, "tp_overlap_comm": True},
}
ZERO: dict[str, Any] = {
    "stage": 3,
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "reduce_bucket_size": 11,
    "use_multi_rank_bucket_allreduce": False,
    "allgather_partitions": False,
    "allgather_bucket_size": 12,
    "overlap_comm": True,
    "load_from_fp32_weights": False,
    "elastic_checkpoint": True,
    "offload_param": {"device": "cpu"},
    "offload_optimizer": {"device": "nvme", "nvme_path": "/ssd"},
    "zenflow": {"topk_ratio": 0.5},
    "sub_group_size": 13,
    "stage3_prefetch_bucket_size": 14,
    "stage3_param_persistence_threshold": 15,
    "stage3_model_persistence_threshold": 16,
    "stage3_max_live_parameters": 17,
    "stage3_max_reuse_distance": 18,
    "stage3_gather_16bit_weights_on_model_save": True,
    "stage3_module_granularity_threshold": 19,
    "stage3_use_all_reduce_for_fetch_params": True,
    "stage3_allgather_sequential": True,
    "ignore_unused_parameters": False,
    "legacy_stage1": True,
    "round_robin_gradients": True,
    "zero_hpz_partition_size": 2,
    "zero_quantized_weights": True,
    "zero_quantized_nontrainable_weights": True,
    "zero_quantized_gradients": True,
    "zeropp_loco_param": {"err_beta": 0.5},
    "mics_shard_size": 4,
    "mics_hierarchical_params_gather": True,
    "memory_efficient_linear": False,
    "pipeline_loading_checkpoint": True,
    "override_module_apply": False,
    "log_trace_cache_warnings": True,
    "enable_sanity_checks": True,
    "save_muon_momentum_buffer_in_memory": True,
    "leaf_module": {"names": ["experts"]},
}
TOP: dict[str, Any] = {
    "gradient_clipping": 0.25,
    "steps_per_print": 7,
    "prescale_gradients": True,
    "gradient_predivide_factor": 2.0,
    "sparse_gradients": True,
    "graph_harvesting": True,
    "wall_clock_breakdown": True,
    "memory_breakdown": True,
    "dump_state": True,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
SECTIONS: dict[str, dict[str, Any]] = {
    "fp16": {"enabled": True, "auto_cast": True, "loss_scale": 8.0, "initial_scale_power": 3, "hysteresis": 4},
    "bf16": {"enabled": True},
    "torch_autocast": {"enabled": True},
    "optimizer": {"type": "Lion", "params": {"lr": 0.5}},
    "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.1}},
    "checkpoint": {"tag_validation": "fail", "load_universal": True, "use_node_local_storage": True},
}


def unchecked(model: Any, given: dict[str, Any]) -> Any:
    """A section with these values, whether they are built or not; a nested section is checked as usual."""
    nested = model.model_validate({key: value for key, value in given.items() if isinstance(value, (dict, list, str))})
    fields = {model.fields_by_key()[key]: value for key, value in given.items()}
    return nested.model_copy(update={name: v for name, v in fields.items() if not isinstance(v, (dict, list, str))})


def everything_on() -> Config:
    config = load_config({"train_batch_size": 1})
    fields = type(config).model_fields
    sections = {name: type(config.section(name) or ZeroSection()) for name in SECTIONS}
    from ds_core.config import OptimizerSection, SchedulerSection

    sections |= {"optimizer": OptimizerSection, "scheduler": SchedulerSection}
    update = {name: unchecked(sections[name], given) for name, given in SECTIONS.items()}
    assert set(TOP) <= set(fields)
    config = config.model_copy(update={**TOP, **update, "zero_optimization": unchecked(ZeroSection, ZERO)})
    config._further = {name: rare_section(name).model_validate(given) for name, given in RARE.items()}
    return config


class Reader(ConfigGetters):
    """The getters over parts of an engine that trained in bf16 with fp32 accumulation."""

    def __init__(self, config: Config) -> None:
        self._config, self.client_optimizer = config, None
        dtypes = SimpleNamespace(stored=torch.bfloat16, accumulate=torch.float32, reduce=torch.float16)
        inputs = SimpleNamespace(
            plan=SimpleNamespace(autocast=torch.bfloat16), dtypes={torch.nn.Parameter(torch.ones(2)): dtypes}
        )
        self.parts = SimpleNamespace(clip=SimpleNamespace(max_norm=0.25), partition=SimpleNamespace(inputs=inputs))

    @property
    def basic_optimizer(self) -> Any:
        return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])


EXPECTED: dict[str, Any] = {
    "gradient_clipping": 0.25,
    "postscale_gradients": False,
    "gradient_predivide_factor": 2.0,
    "steps_per_print": 7,
    "graph_harvesting": True,
    "fp16_enabled": True,
    "bfloat16_enabled": True,
    "amp_enabled": True,
    "amp_params": {"opt_level": "O2"},
    "fp16_auto_cast": True,
    "torch_autocast_enabled": True,
    "torch_autocast_dtype": torch.bfloat16,
    "loss_scale": 8.0,
    "dynamic_loss_scale": False,
    "initial_dynamic_scale": 8,
    "dynamic_loss_scale_args": {
        "init_scale": 8,
        "scale_window": 1000,
        "delayed_shift": 4,
        "consecutive_hysteresis": False,
        "min_scale": 1,
    },
    "get_data_types": (torch.bfloat16, torch.float32),
    "wall_clock_breakdown": True,
    "memory_breakdown": True,
    "dump_state": True,
    "sparse_gradients_enabled": True,
    "optimizer_name": "Lion",
    "optimizer_params": {"lr": 0.5},
    "scheduler_name": "OneCycle",
    "scheduler_params": {"cycle_min_lr": 0.1},
    "elasticity_enabled": True,
    "pld_enabled": True,
    "pld_params": {"theta": 0.5, "gamma": 0.01},
    "pld_theta": 0.5,
    "pld_gamma": 0.01,
    "curriculum_enabled_legacy": True,
    "curriculum_learning_enabled": True,
    "random_ltd_enabled": True,
    "autotp_size": 2,
    "use_node_local_storage": True,
    "load_universal_checkpoint": True,
    "checkpoint_tag_validation_enabled": True,
    "checkpoint_tag_validation_fail": True,
    "zero_optimization": True,
    "zero_optimization_stage": 3,
    "zero_optimization_partition_gradients": True,
    "zero_optimization_partition_weights": True,
    "zero_use_cpu_optimizer": True,
    "zero_cpu_offload": False,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
"""What each getter returns over ``everything_on()``; those of whole sections and one for each key are below."""
OF_SECTIONS = {
    *("aio_config", "tensor_parallel_config"),
    *("curriculum_params_legacy", "curriculum_learning_config", "random_ltd_config"),
}
PROPERTIES = {"communication_data_type"}


@pytest.mark.parametrize("name", EXPECTED)
def test_getter(name: str) -> None:
    value = getattr(Reader(everything_on()), name)()
    assert value == EXPECTED[name]
    assert type(value) is type(EXPECTED[name])


def test_getters_of_whole_sections() -> None:
    reader = Reader(everything_on())
    assert reader.aio_config().items() >= {"block_size": 4096, "queue_depth": 3, "single_submit": False}.items()
    assert (reader.tensor_parallel_config().autotp_size, reader.tensor_parallel_config().tp_overlap_comm) == (2, True)
    metric = reader.curriculum_learning_config()["curriculum_metrics"]["length"]
    assert metric.items() >= {"schedule_type": "fixed_root", "min_difficulty": 1}.items()
    assert reader.curriculum_params_legacy().items() >= {"enabled": True, "curriculum_type": "seqlen"}.items()
    assert reader.random_ltd_config().items() >= {"enabled": True, "total_layer_num": 12}.items()
    assert reader.communication_data_type == torch.float16


def zero_getter(key: str) -> str:
    name = key.removeprefix("stage3_")
    return name if name.startswith("zero") else f"zero_{name}"


@pytest.mark.parametrize("key", ZERO)
def test_zero_getter(key: str) -> None:
    value, default = (getattr(Reader(config), zero_getter(key))() for config in (everything_on(), off()))
    given = ZERO[key]
    if isinstance(given, dict):
        ((inner, given),) = list(given.items())[-1:]
        value = getattr(value, inner)
        value = list(value) if isinstance(value, tuple) else value
    assert value == given
    assert value != default


def off() -> Config:
    return load_config({"train_batch_size": 1})


def test_every_key_of_zero_has_its_getter() -> None:
    fields = ZeroSection.fields_by_key()
    assert {fields[key] for key in ZERO} == set(ZeroSection.model_fields)


@pytest.mark.parametrize("section", ONE_FOR_EACH_KEY)
def test_one_getter_for_each_key(section: str) -> None:
    assert set(ONE_FOR_EACH_KEY[section]) == set(rare_section(section).model_fields)
    reader, without = Reader(everything_on()), Reader(off())
    for key in ONE_FOR_EACH_KEY[section]:
        default = rare_section(section).model_fields[key].get_default(call_default_factory=True)
        assert getattr(reader, f"{section}_{key}")() == RARE[section].get(key, default)
        assert getattr(without, f"{section}_{key}")() == default


def test_an_engine_has_each_of_them_and_no_more() -> None:
    found = {name for cls in (ConfigGetters, ZeroGetters) for name in vars(cls) if not name.startswith("_")}
    of_keys = {f"{section}_{key}" for section, keys in ONE_FOR_EACH_KEY.items() for key in keys}
    of_keys |= {zero_getter(key) for key in ZERO}
    assert found == {*EXPECTED, *OF_SECTIONS, *PROPERTIES, *of_keys}
    for name in found - PROPERTIES:
        getter = getattr(EngineFace, name)
        assert (getter.__name__, list(inspect.signature(getter).parameters)) == (name, ["self"])
        assert inspect.signature(getter).return_annotation is not inspect.Parameter.empty
        assert name in dir(EngineFace)


def test_generated_getters_are_documented_and_typed() -> None:
    getter = EngineFace.zero_reduce_bucket_size
    assert getter.__doc__ == "Return ``zero_optimization.reduce_bucket_size`` of the configuration."
    assert getter.__qualname__ == "ZeroGetters.zero_reduce_bucket_size"
    assert inspect.signature(getter).return_annotation is int
    assert EngineFace.flops_profiler_detailed.__doc__ == "Return ``flops_profiler.detailed`` of the configuration."


@pytest.mark.parametrize("name", ["zero_grad_hooks", "swap_tensor_config"])
def test_getters_that_are_dead_in_deepspeed_are_not_here(name: str) -> None:
    assert not hasattr(EngineFace, name)


def test_on_an_engine() -> None:
    config = {"train_batch_size": 2, "optimizer": {"type": "Adam"}, "flops_profiler": {"enabled": False}}
    engine = ds_core.initialize(model=torch.nn.Linear(2, 1), config=config)[0]
    assert engine.zero_gather_16bit_weights_on_model_save() is False
    assert engine.zero_optimization_stage() == 0
    assert engine.zero_offload_optimizer() is engine.zero_offload_param() is None
    assert (engine.optimizer_name(), engine.optimizer_params()) == ("Adam", {})
    assert (engine.scheduler_name(), engine.scheduler_params()) == (None, None)
    assert (engine.flops_profiler_enabled(), engine.flops_profiler_profile_step()) == (False, 1)
    assert (engine.elasticity_enabled(), engine.amp_enabled(), engine.amp_params()) == (False, False, {})
    assert engine.checkpoint_tag_validation_enabled() is True
    assert engine.checkpoint_tag_validation_fail() is False


def test_a_clients_optimizer_goes_before_the_configured_one() -> None:
    model = torch.nn.Linear(2, 1)
    config = {"train_batch_size": 2, "optimizer": {"type": "Adam", "params": {"lr": 1}}}
    engine = ds_core.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1), config=config)[0]
    assert engine.optimizer_name() == "SGD"
    assert engine.optimizer_params() == {"lr": 1}
