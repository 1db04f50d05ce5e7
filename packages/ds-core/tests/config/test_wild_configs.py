"""Configurations published with DeepSpeed: each loads, strictly or in compatibility mode with the warnings listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ds_core.config.loading import examine, load_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FOLDER = Path(__file__).parents[5] / "shared" / "fixtures" / "configs"
FILES = sorted(FOLDER.glob("*.json"))

WARNED = {
    "hybrid_engine__hybrid_engine_config.json": [
        (
            "zero_optimization.offload_param",
            'device is "cpu", which needs ZeRO stage 3, and zero_optimization.stage is 0',
        )
    ],
}
"""Strict mode refuses these for this, DeepSpeed ignores it, and so does compatibility mode, with a warning."""
RENAMED = {
    "Megatron_GPT2__ds_config_func_bs4_zero2_offload.json": ["zero_optimization.cpu_offload"],
    "Megatron_GPT2__ds_config_func_bs8_zero2_offload.json": ["zero_optimization.cpu_offload"],
}
"""Deprecated keys, which are read as today's in both modes."""
NO_BATCH_SIZE = {"config_templates__template_zero3.json"}
"""Refused only at ``initialize``."""

PUBLISHED_KEYS = """
train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping steps_per_print
prescale_gradients wall_clock_breakdown disable_allgather
optimizer optimizer.type optimizer.params
optimizer.params.lr optimizer.params.betas optimizer.params.eps optimizer.params.weight_decay
optimizer.params.bias_correction
scheduler scheduler.type scheduler.params
scheduler.params.warmup_min_lr scheduler.params.warmup_max_lr scheduler.params.warmup_num_steps
fp16 fp16.enabled fp16.loss_scale fp16.loss_scale_window fp16.hysteresis fp16.min_loss_scale
bf16 bf16.enabled
zero_optimization zero_optimization.stage
zero_optimization.allgather_partitions zero_optimization.allgather_bucket_size zero_optimization.overlap_comm
zero_optimization.reduce_scatter zero_optimization.reduce_bucket_size zero_optimization.contiguous_gradients
zero_optimization.sub_group_size zero_optimization.cpu_offload
zero_optimization.offload_param zero_optimization.offload_param.device
zero_optimization.stage3_max_live_parameters zero_optimization.stage3_max_reuse_distance
zero_optimization.stage3_prefetch_bucket_size zero_optimization.stage3_param_persistence_threshold
zero_optimization.stage3_gather_16bit_weights_on_model_save
activation_checkpointing activation_checkpointing.partition_activations
activation_checkpointing.contiguous_memory_optimization
"""
"""Every key that one of the published configurations has, so that they need not be here."""

needs_folder = pytest.mark.skipif(
    not FILES, reason="the folder of published configurations is not beside this checkout"
)


@pytest.fixture(autouse=True)
def _strict_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_CONFIG_COMPATIBLE", raising=False)


def _keys(value: Any, path: str = "") -> Iterator[str]:
    for key, item in value.items() if isinstance(value, dict) else ():
        yield path + key
        yield from _keys(item, f"{path}{key}.")


def _keys_of(paths: Iterable[Path]) -> set[str]:
    return {key for path in paths for key in _keys(json.loads(path.read_text(encoding="utf-8")))}


@needs_folder
@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_published_config(path: Path) -> None:
    strict, compatible = examine(path), examine(path, compatible=True)
    warned = WARNED.get(path.name, [])
    assert [(problem.path, problem.text) for problem in strict.problems] == warned
    assert [(problem.path, problem.text) for problem in compatible.warnings] == warned
    assert compatible.problems == strict.warnings == ()
    assert [".".join(map(str, row.old)) for row in strict.renamed] == RENAMED.get(path.name, [])
    if path.name not in NO_BATCH_SIZE:
        assert load_config(path, compatible=bool(warned)).train_batch_size >= 1


@needs_folder
@pytest.mark.parametrize("name", sorted(NO_BATCH_SIZE))
def test_without_batch_size_only_a_run_is_refused(name: str) -> None:
    assert [problem.path for problem in examine(FOLDER / name, dp_world_size=1).problems] == ["train_batch_size"]


@needs_folder
def test_every_listed_file_is_there() -> None:
    assert WARNED.keys() | RENAMED.keys() | NO_BATCH_SIZE <= {path.name for path in FILES}


@needs_folder
def test_the_list_of_published_keys_is_whole() -> None:
    assert {key for path in FILES for key in _keys(json.loads(path.read_text(encoding="utf-8")))} == set(
        PUBLISHED_KEYS.split()
    )


def test_our_own_configurations_have_the_published_keys() -> None:
    # Those are loaded by test_clients, wherever this checkout is.
    ours = Path(__file__).with_name("clients").glob("published_keys_*.json")
    assert {key for path in ours for key in _keys(json.loads(path.read_text(encoding="utf-8")))} >= set(
        PUBLISHED_KEYS.split()
    )
