"""Sections inference, hybrid_engine and weight_quantization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from ds_core.config.problems import validate
from ds_core.config.sections.inference import (
    GroupQuantizationSection,
    HybridEngineSection,
    InferenceRanksSection,
    InferenceSection,
    MoeSection,
    QuantSection,
    WeightQuantizationSection,
)
from ds_core.config.sections.zero import ZeroSection
from ds_core.testing.config import SectionContract

if TYPE_CHECKING:
    from ds_core.config import Section

RANKS = {"enabled": True, "tp_size": 1, "tp_grain_size": 64, "mpu": None, "tp_group": None}
MOE = {
    "enabled": True,
    "ep_size": 1,
    "moe_experts": (1,),
    "type": "standard",
    "ep_mp_group": None,
    "ep_group": None,
}
GROUP = {"num_bits": None, "group_size": None, "group_dim": None, "symmetric": False}
QUANTIZER = {"enabled": True, "num_bits": 8, "q_type": "symmetric", "q_groups": 1}
WEIGHT = {**QUANTIZER, "quantized_initialization": GROUP, "post_init_quant": {}}
DEFAULTS: dict[type[Section], dict[str, Any]] = {
    HybridEngineSection: {
        "enabled": False,
        "max_out_tokens": 512,
        "inference_tp_size": 1,
        "release_inference_cache": False,
        "pin_parameters": True,
        "tp_gather_partition_size": 8,
        "enable_cuda_graph": False,
    },
    WeightQuantizationSection: WEIGHT,
    QuantSection: {"enabled": True, "activation": QUANTIZER, "weight": WEIGHT, "qkv": {"enabled": True}},
    InferenceSection: {
        "replace_with_kernel_inject": False,
        "dtype": "float16",
        "tensor_parallel": RANKS,
        "enable_cuda_graph": False,
        "use_triton": False,
        "triton_autotune": False,
        "zero": ZeroSection().model_dump(by_alias=True),
        "triangular_masking": True,
        "moe": MOE,
        "keep_module_on_host": False,
        "quant": {"enabled": True, "activation": QUANTIZER, "weight": WEIGHT, "qkv": {"enabled": True}},
        "checkpoint": None,
        "base_dir": "",
        "set_empty_params": False,
        "save_mp_checkpoint_path": None,
        "checkpoint_config": {"checkpoint_dir": None, "save_mp_checkpoint_path": None, "base_dir": None},
        "return_tuple": True,
        "training_mp_size": 1,
        "injection_policy": None,
        "injection_policy_tuple": None,
        "config": None,
        "max_out_tokens": 1024,
        "min_out_tokens": 1,
        "transposed_mode": False,
        "replace_method": "auto",
        "mp_size": 1,
        "mpu": None,
        "ep_size": 1,
        "ep_group": None,
        "ep_mp_group": None,
        "moe_experts": (1,),
        "moe_type": "standard",
    },
}


class TestHybridEngineSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return HybridEngineSection


class TestWeightQuantizationSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return WeightQuantizationSection

    @pytest.fixture
    def valid(self) -> dict[str, Any]:
        return {"post_init_quant": {"mlp": {"num_bits": 4, "group_size": 64, "group_dim": 0}}}


class TestQuantSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return QuantSection


class TestInferenceSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return InferenceSection

    @pytest.fixture
    def valid(self) -> dict[str, Any]:
        return {"dtype": "int8", "mp_size": 2, "moe": True, "checkpoint": {"type": "ds_model"}}


def inference(**values: Any) -> InferenceSection:
    return InferenceSection.model_validate(values)


def problem_of(section_class: type[Section], **given: Any) -> str:
    _, (problem,) = validate(section_class, given)
    return f"{problem.path}: {problem.text}"


@pytest.mark.parametrize("section_class", DEFAULTS)
def test_defaults(section_class: type[Section]) -> None:
    assert section_class().model_dump(by_alias=True) == DEFAULTS[section_class]


# hybrid_engine


def test_hybrid_engine_is_a_switch() -> None:
    assert not HybridEngineSection(max_out_tokens=64).is_on()
    assert HybridEngineSection(enabled=True).is_on()


@pytest.mark.parametrize("name", ["max_out_tokens", "inference_tp_size", "tp_gather_partition_size"])
def test_hybrid_engine_counts_from_one(name: str) -> None:
    assert problem_of(HybridEngineSection, **{name: 0}) == f"{name}: got 0, must be at least 1"


# weight_quantization


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"enabled": True},
        {"enabled": True, "num_bits": 8, "quantized_initialization": {}, "post_init_quant": {}},
        {"enabled": False, "num_bits": 4, "post_init_quant": {"mlp": {"num_bits": 4}}},
        {"num_bits": "auto"},
    ],
)
def test_weights_stay_as_they_are(given: dict[str, Any]) -> None:
    assert not WeightQuantizationSection.model_validate(given).is_on()


@pytest.mark.parametrize(
    "given",
    [
        {"num_bits": 4},
        {"q_type": "asymmetric"},
        {"post_init_quant": {"mlp": {"num_bits": 4}}},
        {"quantized_initialization": {"num_bits": 8, "group_size": 64, "group_dim": 1}},
    ],
)
def test_weights_are_quantized(given: dict[str, Any]) -> None:
    assert WeightQuantizationSection.model_validate(given).is_on()


def test_size_of_a_group_is_in_elements() -> None:
    section = GroupQuantizationSection.model_validate({"group_size": 64})
    assert section.group_numel == 64


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"post_init_quant": {"mlp": {"num_bits": 3}}},
            "post_init_quant.mlp.num_bits: got 3, allowed are 4 or 8",
        ),
        (
            {"post_init_quant": {"mlp": {"bits": 4}}},
            "post_init_quant.mlp.bits: unknown key (its value is 4)",
        ),
        (
            {"quantized_initialization": {"group_size": 0}},
            "quantized_initialization.group_size: got 0, must be at least 1",
        ),
        ({"q_type": "even"}, 'q_type: got "even", allowed are "symmetric" or "asymmetric"'),
    ],
)
def test_what_quantization_refuses(given: dict[str, Any], text: str) -> None:
    assert problem_of(WeightQuantizationSection, **given) == text


# inference


@pytest.mark.parametrize(
    ("alias", "field", "value"),
    [
        ("kernel_inject", "replace_with_kernel_inject", True),
        ("tp", "tensor_parallel", InferenceRanksSection(tp_size=2)),
        ("tm", "triangular_masking", False),
        ("ckpt_config", "checkpoint_config", {"base_dir": "there"}),
        ("injection_dict", "injection_policy", {"T5Block": ("SelfAttention.o",)}),
        ("args", "config", {"hidden_size": 8}),
        ("max_tokens", "max_out_tokens", 64),
        ("min_tokens", "min_out_tokens", 2),
    ],
)
def test_aliases(alias: str, field: str, value: Any) -> None:
    assert inference(**{alias: value}) == inference(**{field: value}) != inference()


@pytest.mark.parametrize(
    ("alias", "field", "value"), [("num_experts", "moe_experts", [4]), ("expert_group", "ep_group", "g")]
)
def test_aliases_of_experts(alias: str, field: str, value: Any) -> None:
    assert MoeSection.model_validate({alias: value}) == MoeSection.model_validate({field: value}) != MoeSection()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        *((written, "float16") for written in ("torch.float16", "fp16", "float16", "half", torch.half)),
        *((written, "float32") for written in ("torch.float32", "fp32", "float32", "float", torch.float)),
        *((written, "bfloat16") for written in ("torch.bfloat16", "bf16", "bfloat16", "bfloat", torch.bfloat16)),
        *((written, "int8") for written in ("torch.int8", "int8", torch.int8)),
    ],
)
def test_dtypes(written: Any, meant: str) -> None:
    assert inference(dtype=written).dtype == meant


@pytest.mark.parametrize("written", ["int9", torch.float64, 8])
def test_no_dtypes(written: Any) -> None:
    assert problem_of(InferenceSection, dtype=written).endswith(
        'allowed are "float16", "bfloat16", "float32" or "int8"'
    )


@pytest.mark.parametrize("value", [True, False])
def test_moe_may_be_a_switch(value: bool) -> None:
    assert inference(moe=value).moe == MoeSection(enabled=value)


@pytest.mark.parametrize("kind", ["standard", "residual"])
def test_kinds_of_experts(kind: str) -> None:
    assert inference(moe={"type": kind}).moe.type == kind
    assert problem_of(InferenceSection, moe={"type": "dense"}).startswith('moe.type: got "dense", allowed are')


@pytest.mark.parametrize("value", ["path.json", {"type": "ds_model", "checkpoints": ["a.pt"]}, None])
def test_a_checkpoint_is_a_path_or_its_description(value: Any) -> None:
    assert inference(checkpoint=value).checkpoint == value
    assert problem_of(InferenceSection, checkpoint=3).endswith("must be the path of a file, or an object")


def test_classes_of_layers_stay_what_they_are() -> None:
    policy = {torch.nn.Linear: ("out",)}
    assert inference(injection_policy=policy).injection_policy == policy


def test_zero_is_a_whole_section() -> None:
    assert inference(zero={"stage": 3}).zero.stage == 3
    assert problem_of(InferenceSection, zero={"stge": 3}).startswith("zero.stge: unknown key")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"mp_size": 2}, {"tensor_parallel": {"tp_size": 2}}),
        ({"mp_size": 2, "tp": {"tp_grain_size": 1}}, {"tensor_parallel": {"tp_size": 2, "tp_grain_size": 1}}),
        ({"mpu": "mpu"}, {"tensor_parallel": {"mpu": "mpu"}}),
        ({"ep_size": 2}, {"moe": {"ep_size": 2}}),
        ({"ep_size": 2, "moe": True}, {"moe": {"enabled": True, "ep_size": 2}}),
        ({"ep_size": 2, "moe": False}, {"moe": {"enabled": False, "ep_size": 2}}),
        ({"ep_group": "g"}, {"moe": {"ep_group": "g"}}),
        ({"expert_group": "g"}, {"moe": {"ep_group": "g"}}),
        ({"ep_mp_group": "g"}, {"moe": {"ep_mp_group": "g"}}),
        ({"expert_mp_group": "g"}, {"moe": {"ep_mp_group": "g"}}),
        ({"moe_experts": [4]}, {"moe": {"moe_experts": [4]}}),
        ({"moe_experts": [4], "moe": {"num_experts": [4]}}, {"moe": {"moe_experts": [4]}}),
        ({"moe_type": "residual"}, {"moe": {"type": "residual"}}),
    ],
)
def test_deprecated_keys(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert inference(**old) == inference(**new)
    assert inference(**old).model_fields_set == inference(**new).model_fields_set


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"mp_size": 2, "tp": {"tp_size": 4}},
            'mp_size: got 2, but its replacement, "tp.tp_size", is 4',
        ),
        (
            {"expert_group": "a", "moe": {"expert_group": "b"}},
            'expert_group: got "a", but its replacement, "moe.expert_group", is "b"',
        ),
        (
            {"moe_experts": [2], "moe": {"num_experts": [4]}},
            'moe_experts: got [2], but its replacement, "moe.num_experts", is [4]',
        ),
    ],
)
def test_deprecated_keys_that_contradict(given: dict[str, Any], text: str) -> None:
    assert problem_of(InferenceSection, **given) == text


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"tensor_parallel": {"tp_size": 1}},
        {"tensor_parallel": {"tp_size": 1, "tp_grain_size": 1}},
        {"tensor_parallel": {"enabled": False, "tp_size": 2}},
        {"mp_size": 1},
        {"replace_method": "module"},
        {"replace_method": None},
        {"moe": False},
        {"dtype": "auto"},
    ],
)
def test_off(given: dict[str, Any]) -> None:
    assert not inference(**given).is_on()


@pytest.mark.parametrize(
    "given",
    [
        {"tensor_parallel": {"tp_size": 2}},
        {"tensor_parallel": {"mpu": "object"}},
        {"mp_size": 2, "replace_method": "module"},
        {"dtype": "bf16"},
        {"kernel_inject": True},
        {"moe": {"ep_size": 2}},
        {"checkpoint": "path.json"},
    ],
)
def test_on(given: dict[str, Any]) -> None:
    assert inference(**given).is_on()


@pytest.mark.parametrize("name", ["max_out_tokens", "min_out_tokens", "training_mp_size"])
def test_inference_counts_from_one(name: str) -> None:
    assert problem_of(InferenceSection, **{name: 0}) == f"{name}: got 0, must be at least 1"
