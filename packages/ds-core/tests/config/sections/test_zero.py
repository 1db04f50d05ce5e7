"""Section zero_optimization: its keys, old and new."""

from __future__ import annotations

from typing import Any

import pytest

from ds_core.config import OffloadOptimizerSection, OffloadParamSection, ZeroSection, find_problems

SCALARS = {
    "stage": 0,
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 5e8,
    "use_multi_rank_bucket_allreduce": True,
    "allgather_partitions": True,
    "allgather_bucket_size": 5e8,
    "overlap_comm": False,
    "load_from_fp32_weights": True,
    "elastic_checkpoint": False,
    "offload_param": None,
    "offload_optimizer": None,
    "zenflow": None,
    "sub_group_size": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
    "prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "param_persistence_threshold": 1e5,
    "stage3_model_persistence_threshold": 9223372036854775807,
    "model_persistence_threshold": 9223372036854775807,
    "stage3_max_live_parameters": 1e9,
    "max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": False,
    "gather_16bit_weights_on_model_save": False,
    "stage3_module_granularity_threshold": 0,
    "module_granularity_threshold": 0,
    "stage3_use_all_reduce_for_fetch_params": False,
    "use_all_reduce_for_fetch_params": False,
    "stage3_allgather_sequential": False,
    "allgather_sequential": False,
    "ignore_unused_parameters": True,
    "legacy_stage1": False,
    "round_robin_gradients": False,
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "zeropp_loco_param": None,
    "mics_shard_size": -1,
    "mics_hierarchical_params_gather": False,
    "memory_efficient_linear": True,
    "pipeline_loading_checkpoint": False,
    "override_module_apply": True,
    "log_trace_cache_warnings": False,
    "enable_sanity_checks": False,
    "save_muon_momentum_buffer_in_memory": False,
}
"""DeepSpeed's keys and defaults."""


def zero(**values: Any) -> ZeroSection:
    return ZeroSection.model_validate(values)


@pytest.mark.parametrize(("key", "default"), SCALARS.items())
def test_key_and_default(key: str, default: Any) -> None:
    assert getattr(zero(), key) == default
    assert zero(**{key: default}) == zero()


def test_no_key_is_missing_from_the_table() -> None:
    fields = ZeroSection.fields_by_key()
    assert {fields[key] for key in SCALARS} | {"leaf_module"} == set(ZeroSection.model_fields)


@pytest.mark.parametrize(("stage", "overlap"), [(0, False), (1, False), (2, False), ("3", True)])
def test_overlap_follows_the_stage_unless_given(stage: Any, overlap: bool) -> None:
    section = zero(stage=stage)
    assert section.overlap_comm is overlap
    assert section.model_fields_set == {"stage"}
    assert zero(stage=stage, overlap_comm=not overlap).overlap_comm is not overlap


@pytest.mark.parametrize("value", [{"cpu_offload": 1}, {"cpu_offload_use_pin_memory": "yes"}])
def test_deprecated_switches_are_true_or_false(value: dict[str, Any]) -> None:
    (problem,) = find_problems({"zero_optimization": value})
    assert problem.text.endswith("must be true or false")


def test_offload_defaults() -> None:
    param, optimizer = OffloadParamSection(), OffloadOptimizerSection()
    assert (param.device, param.buffer_count, param.buffer_numel, param.pin_memory) == ("none", 5, 10**8, True)
    assert (optimizer.device, optimizer.buffer_count, optimizer.ratio, optimizer.pipeline) == ("none", 4, 1.0, False)
    assert OffloadOptimizerSection(pipeline_write=True).pipeline


def test_partial_offload_at_stage_3() -> None:
    assert find_problems({"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 0.5}}}) == []


def test_leaf_modules() -> None:
    leaf = zero(leaf_module={"names": "experts", "name_suffixes": ["a", "b", "a"]}).leaf_module
    assert (leaf.names, leaf.name_suffixes, len(leaf.classes)) == (("experts",), ("a", "b"), 3)
    (problem,) = find_problems({"zero_optimization": {"leaf_module": {"classes": 3}}})
    assert problem.text == "got 3, must be a list"
