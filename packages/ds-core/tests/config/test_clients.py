"""Configurations as DeepSpeed's clients write them, in ``clients/``: each loads, or is refused for what is listed here.

A file in no table loads in strict mode without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ds_core.config import ConfigError
from ds_core.config.loading import Examined, examine, load_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ds_core.config.problems import Problem

FILES = sorted(Path(__file__).with_name("clients").glob("*.json"))
NOT_BUILT = "which is not built yet"
LATER = "this section is not built yet; it comes with a later release of "
AT_STAGE_0 = "and zero_optimization.stage is 0"

WARNED: dict[str, list[tuple[str, str]]] = {
    "accelerate_msamp.json": [("msamp", "unknown key")],
    "axolotl_zero1_torch_compile.json": [
        # DeepSpeed 0.19 refuses both; here an unknown key is one, whatever the section.
        ("compile.disable", "unknown key"),
        ("compile.backend", "unknown key"),
    ],
    "llama_factory_commented.json": [
        ("_comment", "unknown key"),
        ("comms_config", "unknown key"),
        ("monitor_config", "unknown key"),
    ],
    "ms_swift_frozen_teacher.json": [
        ('"zero_optimization.reduce_bucket_size"', "unknown key"),
        ('"zero_optimization.stage3_param_persistence_threshold"', "unknown key"),
        ('"zero_optimization.stage3_prefetch_bucket_size"', "unknown key"),
    ],
    "published_keys_stage0_offload.json": [("zero_optimization.offload_param", AT_STAGE_0)],
    "trl_frozen_stage0_offload.json": [("zero_optimization.offload_optimizer", AT_STAGE_0)],
    "trl_frozen_zero3.json": [
        ('"zero_optimization.reduce_bucket_size"', "unknown key"),
        ('"zero_optimization.stage3_param_persistence_threshold"', "unknown key"),
        ('"zero_optimization.stage3_prefetch_bucket_size"', "unknown key"),
    ],
}
"""File -> what strict mode refuses and compatibility mode drops: path, and a part of the text."""

REFUSED: dict[str, list[tuple[str, str]]] = {
    "openrlhf_train_deepcompile_tp.json": [
        ("compile", LATER + "ds-core"),
        ("tensor_parallel", LATER + "ds-inference"),
    ],
    "transformers_save_on_each_node.json": [
        ("checkpoint.use_node_local_storage", "would leave every node with a part of the checkpoint")
    ],
    "transformers_tensor_parallel.json": [("tensor_parallel", LATER + "ds-inference")],
}
"""File -> what both modes refuse: features that are asked for and not built. Building one takes its line away."""

RENAMED = {"published_keys_stage2.json": ["zero_optimization.cpu_offload"]}
"""File -> deprecated keys in it, which both modes read as today's."""

NO_BATCH_SIZE = {"published_keys_stage3.json"}
"""A template: refused only where a run starts."""
WORLD = {"published_keys_stage2.json": 1}
"""Data-parallel ranks that the batch sizes of a file are for, where those are not two."""


@pytest.fixture(autouse=True)
def _strict_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_CONFIG_COMPATIBLE", raising=False)


@pytest.fixture(params=FILES, ids=[path.name for path in FILES])
def path(request: pytest.FixtureRequest) -> Path:
    file: Path = request.param
    return file


def _content(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _autos(value: Any, path: str = "") -> Iterator[str]:
    if value == "auto":
        yield path
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from _autos(item, f"{path}.{key}" if path else key)


def _only_for_a_run(path: Path) -> set[str]:
    """Return the paths of the values that only a run needs, and that the client has not filled in."""
    needed = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    prefixes = ("optimizer.", "scheduler.")
    missing = {"train_batch_size"} if path.name in NO_BATCH_SIZE else set()
    return missing | {auto for auto in _autos(_content(path)) if auto in needed or auto.startswith(prefixes)}


def _are(problems: Iterable[Problem], expected: list[tuple[str, str]]) -> bool:
    found = sorted((problem.path, problem.text) for problem in problems)
    return len(found) == len(expected) and all(
        path == wanted and part in text for (path, text), (wanted, part) in zip(found, sorted(expected), strict=True)
    )


def _check(path: Path, strict: Examined, compatible: Examined) -> None:
    warned, refused = WARNED.get(path.name, []), REFUSED.get(path.name, [])
    assert _are(strict.problems, warned + refused), strict.problems
    assert strict.warnings == ()
    assert _are(compatible.problems, refused), compatible.problems
    assert _are(compatible.warnings, warned), compatible.warnings
    for examined in (strict, compatible):
        assert [".".join(map(str, row.old)) for row in examined.renamed] == RENAMED.get(path.name, [])


def test_file(path: Path) -> None:
    _check(path, examine(path), examine(path, compatible=True))


def test_dict(path: Path) -> None:
    """Clients pass the dict rather than the file, with Python's own infinity."""
    content = _content(path)
    _check(path, examine(content), examine(content, compatible=True))
    assert content == _content(path)


def test_run(path: Path) -> None:
    """Where a run starts, what the client left open is named too, and everything else loads."""
    world, is_compatible = WORLD.get(path.name, 2), path.name in WARNED
    refused = {path for path, _ in REFUSED.get(path.name, [])}
    open_values = _only_for_a_run(path)
    examined = examine(path, dp_world_size=world, compatible=is_compatible)
    assert {problem.path for problem in examined.problems} == refused | open_values
    if refused or open_values:
        with pytest.raises(ConfigError):
            load_config(path, dp_world_size=world, compatible=is_compatible)
        return
    config = load_config(path, dp_world_size=world, compatible=is_compatible)
    sizes = config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps, world
    assert config.train_batch_size == sizes[0] * sizes[1] * sizes[2]


def test_every_listed_file_is_there() -> None:
    assert {*WARNED, *REFUSED, *RENAMED, *NO_BATCH_SIZE, *WORLD} <= {path.name for path in FILES}
    assert len(FILES) >= 20


def _loaded(name: str) -> Any:
    return examine(Path(__file__).with_name("clients") / name, compatible=True).config


def test_auto_in_nested_keys_is_the_default() -> None:
    zero = _loaded("openrlhf_train_adamw.json").zero_optimization
    assert (zero.stage3_prefetch_bucket_size, zero.sub_group_size, zero.reduce_bucket_size) == (5e7, 1e9, 5e8)
    offload = _loaded("accelerate_zero_init.json").zero_optimization.offload_param
    assert offload is not None
    assert offload.device == "none"


def test_infinite_steps_per_print_is_never() -> None:
    assert _loaded("accelerate_bf16.json").steps_per_print is None


def test_a_dotted_key_changes_nothing() -> None:
    zero = _loaded("trl_frozen_zero3.json").zero_optimization
    assert (zero.stage, zero.stage3_prefetch_bucket_size, zero.reduce_bucket_size) == (3, 5e7, 5e8)


def test_unprefixed_names_of_stage_3() -> None:
    zero = _loaded("axolotl_zero3_bf16.json").zero_optimization
    assert (zero.max_live_parameters, zero.max_reuse_distance, zero.sub_group_size) == (0, 0, 0)
    assert zero.gather_16bit_weights_on_model_save


def test_offload_at_stage_0_is_dropped() -> None:
    zero = _loaded("trl_frozen_stage0_offload.json").zero_optimization
    assert zero.offload_optimizer is None
    assert zero.stage == 0


def test_both_precisions_written_and_one_enabled() -> None:
    for name, precision in (("accelerate_fp16.json", "fp16"), ("accelerate_bf16.json", "bf16")):
        config = _loaded(name)
        assert [section for section in ("fp16", "bf16") if getattr(config, section).enabled] == [precision]


def test_old_name_of_the_threads_of_aio() -> None:
    assert _loaded("lightning_stage3_offload.json").section("aio").intra_op_parallelism == 1
    assert examine({"aio": {"thread_count": 3}}).config.section("aio").intra_op_parallelism == 3
