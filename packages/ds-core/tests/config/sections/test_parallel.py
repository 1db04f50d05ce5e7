"""Sections pipeline, tensor_parallel and expert_parallel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from ds_core.config.problems import validate
from ds_core.config.sections.parallel import (
    ExpertParallelSection,
    LayerSpecSection,
    PartitionConfigSection,
    PipelineSection,
    TensorParallelSection,
    TensorRanksSection,
)
from ds_core.testing.config import SectionContract

if TYPE_CHECKING:
    from ds_core.config import Section

DEFAULTS: dict[type[Section], dict[str, Any]] = {
    PipelineSection: {
        "stages": "auto",
        "partition": "best",
        "seed_layers": False,
        "activation_checkpoint_interval": 0,
        "pipe_partitioned": True,
        "grad_partitioned": True,
        "use_reentrant": True,
    },
    TensorRanksSection: {"tp_size": 1, "tp_grain_size": 1, "mpu": None, "tp_group": None},
    PartitionConfigSection: {
        "use_default_specs": True,
        "strict_mode": False,
        "tp_size": None,
        "embedding_partition_dim": 1,
        "lm_head_patterns": ("lm_head", "embed_out"),
        "layer_specs": (),
    },
    LayerSpecSection: {
        "patterns": (),
        "partition_type": "column",
        "shape": None,
        "partition_dim": None,
        "model_types": None,
        "gather_output": False,
        "grad_allreduce": False,
    },
    TensorParallelSection: {
        "autotp_size": 0,
        "dtype": "float16",
        "tp_overlap_comm": False,
        "tensor_parallel": {"tp_size": 1, "tp_grain_size": 1, "mpu": None, "tp_group": None},
        "preset_model": None,
        "partition_config": None,
        "injection_policy_tuple": None,
        "keep_module_on_host": False,
        "replace_with_kernel_inject": False,
    },
    ExpertParallelSection: {
        "enabled": False,
        "autoep_size": 1,
        "expert_tensor_parallel_size": 1,
        "validate_folding_routing": False,
        "preset_model": None,
        "moe_layer_pattern": None,
        "expert_pattern": None,
        "router_pattern": None,
        "use_grouped_mm": True,
        "disable_triton_grouped_mm": False,
        "route_norm": None,
        "route_scale": 1.0,
        "score_apply": "auto",
        "combine_impl": "auto",
        "score_func": "auto",
        "top_k": "auto",
        "routed_scaling_factor": "auto",
        "num_expert_groups": None,
        "num_limited_groups": None,
        "load_balance_coeff": None,
        "expert_w1": None,
        "expert_w2": None,
        "expert_w3": "auto",
        "num_experts_attr": None,
        "top_k_attr": None,
        "has_shared_experts": None,
        "shared_experts_pattern": None,
        "shared_experts_gate_pattern": None,
    },
}


class TestPipelineSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return PipelineSection


class TestTensorParallelSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return TensorParallelSection

    @pytest.fixture
    def valid(self) -> dict[str, Any]:
        spec = {"patterns": [".*q_proj.weight"], "shape": [[2, 4], -1], "model_types": ["llama"]}
        return {"autotp_size": 2, "dtype": "bf16", "partition_config": {"layer_specs": [spec]}}


class TestTensorRanksSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return TensorRanksSection


class TestPartitionConfigSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return PartitionConfigSection


class TestLayerSpecSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return LayerSpecSection


class TestExpertParallelSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return ExpertParallelSection


def problem_of(section_class: type[Section], **given: Any) -> str:
    _, (problem,) = validate(section_class, given)
    return f"{problem.path}: {problem.text}"


@pytest.mark.parametrize("section_class", DEFAULTS)
def test_defaults(section_class: type[Section]) -> None:
    assert section_class().model_dump(by_alias=True) == DEFAULTS[section_class]
    assert section_class.model_validate(DEFAULTS[section_class]) == section_class()
    assert not section_class.model_validate(DEFAULTS[section_class]).is_on()


# pipeline


@pytest.mark.parametrize(
    ("given", "on"),
    [
        ({"stages": 2}, True),
        ({"partition": "uniform"}, True),
        ({"activation_checkpoint_interval": 1}, True),
        ({"use_reentrant": False}, True),
        ({"use_reentrant": None}, False),
        ({"use_reentrant": "auto"}, False),
        ({"stages": "auto", "partition": "BEST"}, False),
    ],
)
def test_pipeline_is_on_away_from_its_defaults(given: dict[str, Any], on: bool) -> None:
    assert PipelineSection.model_validate(given).is_on() is on


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Uniform", "uniform"),
        ("parameters", "parameters"),
        ("type:Block", "type:Block"),
        (r"TYPE:a\S:b", r"type:a\S:b"),
    ],
)
def test_partition_methods(written: str, meant: str) -> None:
    assert PipelineSection.model_validate({"partition": written}).partition == meant


@pytest.mark.parametrize("written", ["profile", "uniform:2", "", "types:a"])
def test_no_partition_method(written: str) -> None:
    assert problem_of(PipelineSection, partition=written).endswith(
        'allowed are "best", "uniform", "parameters" or "type:REGEX"'
    )


def test_what_a_pipeline_refuses() -> None:
    assert "must be a regular expression" in problem_of(PipelineSection, partition="type:(")
    assert problem_of(PipelineSection, stages=0) == 'stages: got 0, must be a whole number from 1, or "auto"'
    assert problem_of(PipelineSection, activation_checkpoint_interval=-1).endswith("must be at least 0")


# tensor_parallel


@pytest.mark.parametrize(
    "given",
    [
        {"autotp_size": 0},
        {"autotp_size": 1, "tp": {"tp_size": 1}},
        {"tensor_parallel": {"tp_grain_size": 8}},
        {"preset_model": "llama", "dtype": "bf16"},
    ],
)
def test_one_rank_divides_nothing(given: dict[str, Any]) -> None:
    assert not TensorParallelSection.model_validate(given).is_on()


@pytest.mark.parametrize("given", [{"autotp_size": 2}, {"autotp_size": 4, "tp": {"tp_size": 4}}])
def test_ranks_that_share_layers(given: dict[str, Any]) -> None:
    assert TensorParallelSection.model_validate(given).is_on()


@pytest.mark.parametrize("name", ["tp", "tensor_parallel"])
def test_both_names_of_the_ranks(name: str) -> None:
    section = TensorParallelSection.model_validate({"autotp_size": 2, name: {"tp_size": 2}})
    assert section.tensor_parallel.tp_size == 2
    assert getattr(section, name) == section.tensor_parallel
    assert problem_of(TensorParallelSection, autotp_size=2, **{name: {"tp_size": 4}}) == (
        f'{name}: got {{"tp_size": 4}}, "tp_size" must be 1 or equal "autotp_size", which is 2'
    )


def test_ranks_are_not_held_against_what_is_invalid() -> None:
    assert problem_of(TensorParallelSection, autotp_size=-1, tp={"tp_size": 2}).startswith("autotp_size: got -1")


def test_objects_stay_what_they_are() -> None:
    group = object()
    ranks = TensorRanksSection.model_validate({"tp_group": group, "mpu": group})
    assert ranks.tp_group is group
    assert ranks.mpu is group


@pytest.mark.parametrize(
    ("written", "meant"), [("bf16", "bfloat16"), ("torch.float16", "float16"), (torch.bfloat16, "bfloat16")]
)
def test_dtype_as_text_and_as_object(written: Any, meant: str) -> None:
    assert TensorParallelSection.model_validate({"dtype": written}).dtype == meant


def test_kernel_injection_has_two_names() -> None:
    assert TensorParallelSection.model_validate({"kernel_inject": True}).replace_with_kernel_inject


@pytest.mark.parametrize("name", ["llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3"])
def test_presets(name: str) -> None:
    assert TensorParallelSection.model_validate({"preset_model": name}).preset_model == name


def test_no_preset() -> None:
    _, (problem,) = validate(TensorParallelSection, {"preset_model": "lama"})
    assert problem.fix == 'did you mean "llama"?'


@pytest.mark.parametrize("shape", [[2, -1], [[8, 4, 4], -1], None, (3,)])
def test_shapes(shape: Any) -> None:
    expected = None if shape is None else tuple(tuple(entry) if isinstance(entry, list) else entry for entry in shape)
    assert LayerSpecSection.model_validate({"shape": shape}).shape == expected


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ([0, 2], "every number must be -1 or at least 1"),
        ([-2], "every number must be -1 or at least 1"),
        ([-1, -1], "-1 may stand there once"),
        ([[1], [2]], "only one list may be inside: that of the dim that is divided"),
        ([[-1, 2], 3], "must be a list of whole numbers, one of which may be a list itself"),
        ([[[1]], 3], "must be a list of whole numbers, one of which may be a list itself"),
        ("3", "must be a list of whole numbers, one of which may be a list itself"),
    ],
)
def test_no_shapes(shape: Any, text: str) -> None:
    assert problem_of(LayerSpecSection, shape=shape).endswith(text)


@pytest.mark.parametrize(
    "given",
    [
        {"gather_output": True},
        {"partition_type": "skip", "grad_allreduce": True},
        {"partition_type": "row", "shape": [2, -1], "partition_dim": 1},
    ],
)
def test_what_goes_together(given: dict[str, Any]) -> None:
    assert LayerSpecSection.model_validate(given).model_dump(exclude_unset=True).keys() == given.keys()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"partition_type": "row", "gather_output": True},
            'gather_output: got true, it is possible with "partition_type": "column" only',
        ),
        ({"shape": [2, -1], "gather_output": True}, 'gather_output: got true, it is not possible with "shape"'),
        (
            {"partition_type": "row", "grad_allreduce": True},
            'grad_allreduce: got true, it is possible with "partition_type": "skip" only',
        ),
        (
            {"partition_type": "rows", "gather_output": True, "grad_allreduce": True},
            'partition_type: got "rows", allowed are "column", "row" or "skip"',
        ),
        ({"partition_dim": -1}, "partition_dim: got -1, must be at least 0"),
    ],
)
def test_what_does_not(given: dict[str, Any], text: str) -> None:
    assert problem_of(LayerSpecSection, **given) == text


def test_problems_deep_inside_are_named() -> None:
    given = {"partition_config": {"layer_specs": [{"patterns": ["("]}, {"partition_typ": "row"}], "tp_size": 0}}
    _, problems = validate(TensorParallelSection, given, path=("tensor_parallel",))
    assert [problem.path for problem in problems] == [
        "tensor_parallel.partition_config.tp_size",
        "tensor_parallel.partition_config.layer_specs[0].patterns[0]",
        "tensor_parallel.partition_config.layer_specs[1].partition_typ",
    ]


# expert_parallel


def test_third_weight_left_out_is_not_null() -> None:
    assert ExpertParallelSection().expert_w3 == "auto"
    assert ExpertParallelSection.model_validate({"expert_w3": "auto"}) == ExpertParallelSection()
    assert ExpertParallelSection.model_validate({"expert_w3": None}).expert_w3 is None
    assert ExpertParallelSection.model_validate({"expert_w3": "up_proj"}).expert_w3 == "up_proj"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("preset_model", ["mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3"]),
        ("score_apply", ["auto", "pre", "post"]),
        ("combine_impl", ["auto", "weighted_sum", "legacy_bmm"]),
        ("score_func", ["auto", "softmax", "sigmoid"]),
    ],
)
def test_words_of_experts(name: str, words: list[str]) -> None:
    for word in words:
        assert getattr(ExpertParallelSection.model_validate({name: word}), name) == word
    assert "allowed are" in problem_of(ExpertParallelSection, **{name: "other"})


@pytest.mark.parametrize("name", ["autoep_size", "expert_tensor_parallel_size", "top_k", "num_expert_groups"])
def test_experts_count_from_one(name: str) -> None:
    assert getattr(ExpertParallelSection.model_validate({name: 2}), name) == 2
    assert problem_of(ExpertParallelSection, **{name: 0}).startswith(f"{name}: got 0, must be")


def test_what_experts_refuse() -> None:
    assert problem_of(ExpertParallelSection, load_balance_coeff=0.1) == (
        "load_balance_coeff: got 0.1, which DeepSpeed refuses too; only null is accepted"
    )
    assert "must be a regular expression" in problem_of(ExpertParallelSection, moe_layer_pattern="(")
    assert problem_of(ExpertParallelSection, routed_scaling_factor="x").endswith('must be a finite number, or "auto"')


def test_experts_are_a_switch() -> None:
    assert not ExpertParallelSection(autoep_size=2).is_on()
    assert ExpertParallelSection(enabled=True).is_on()
