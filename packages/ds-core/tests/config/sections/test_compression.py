"""Sections ``compression_training``, ``quantize_training`` and ``sparse_attention``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ds_core.config.problems import Problem, validate
from ds_core.config.sections import compression
from ds_core.config.sections.compression import (
    CompressionTrainingSection,
    EigenvalueSection,
    LayerReductionSection,
    QuantizeTrainingSection,
    SparseAttentionSection,
)
from ds_core.testing.config import SectionContract

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ds_core.config import Section

TECHNIQUES = [name for name in CompressionTrainingSection.model_fields if name != "layer_reduction"]


class TestContract(SectionContract):
    @pytest.fixture(params=[name for name in compression.__all__ if name != "QuantizeTrainingSection"])
    def section_class(self, request: pytest.FixtureRequest) -> type[Section]:
        return getattr(compression, request.param)


class TestQuantizeTraining(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return QuantizeTrainingSection

    def test_an_unknown_key_is_an_error(self, section_class: type[Section], valid: Mapping[str, Any]) -> None:
        """Not here: the keys of this section are nowhere written down, so all are kept."""
        kept = section_class.model_validate({**valid, "quantize_bits": {"start_bits": 16}})
        assert kept.model_dump(exclude_unset=True) == {"quantize_bits": {"start_bits": 16}}
        assert validate(section_class, {"eigenvalue": {"zork": 1}})[1] != []


def only(section: type[Section], value: dict[str, Any]) -> Problem:
    _, (problem,) = validate(section, value)
    return problem


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"weight_quantization": {"shared_parameters": {"enabled": False, "quantize_groups": 8}}},
        {"weight_quantization": {"shared_parameters": {"fp16_mixed_quantize": {"enabled": True}}}},
        {"head_pruning": {"different_groups": {"mine": {"params": {"dense_ratio": 0.5}}}}},
        {"layer_reduction": {"enabled": False, "keep_number_layer": 5}},
    ],
)
def test_compression_is_off(value: dict[str, Any]) -> None:
    assert not CompressionTrainingSection.model_validate(value).is_on()


@pytest.mark.parametrize("name", TECHNIQUES)
def test_compression_is_on_with_one_technique(name: str) -> None:
    params = {"start_bits": 8, "target_bits": 4} if name == "weight_quantization" else {"dense_ratio": 0.5}
    params = {"bits": 8} if name == "activation_quantization" else params
    shared = {"enabled": True, "num_heads": 12} if name == "head_pruning" else {"enabled": True}
    value = {name: {"shared_parameters": shared, "different_groups": {"mine": {"params": params}}}}
    assert CompressionTrainingSection.model_validate(value).is_on()


def test_compression_is_on_with_layer_reduction() -> None:
    value = {"layer_reduction": {"enabled": True, "keep_number_layer": 5, "other_module_name": "bert.pooler"}}
    section = CompressionTrainingSection.model_validate(value)
    assert section.is_on()
    assert section.layer_reduction.other_module_name == ("bert.pooler",)
    assert CompressionTrainingSection.comes_with == "ds-core"


def test_layer_reduction() -> None:
    assert LayerReductionSection().model_dump() == {
        "enabled": False,
        "keep_number_layer": None,
        "module_name_prefix": None,
        "teacher_layer": None,
        "other_module_name": None,
    }
    assert only(LayerReductionSection, {"teacher_layer": [1, -1]}).path == "teacher_layer[1]"
    assert only(LayerReductionSection, {"keep_number_layer": 0}).path == "keep_number_layer"


def test_eigenvalue() -> None:
    assert EigenvalueSection().model_dump() == {
        "enabled": False,
        "verbose": False,
        "max_iter": 100,
        "tol": 1e-2,
        "stability": 1e-6,
        "gas_boundary_resolution": 1,
        "layer_name": "bert.encoder.layer",
        "layer_num": 0,
    }
    assert EigenvalueSection(enabled=True).is_on()
    assert not EigenvalueSection(max_iter=5).is_on()
    assert EigenvalueSection.comes_with == "ds-core"
    for key, value in {"max_iter": 0, "tol": -1, "stability": -1, "gas_boundary_resolution": 0}.items():
        assert only(EigenvalueSection, {key: value}).path == key


@pytest.mark.parametrize(
    ("value", "is_on"),
    [
        ({}, False),
        ({"enabled": False}, False),
        ({"enabled": False, "quantize_bits": {"start_bits": 16}}, False),
        ({"eigenvalue": {"enabled": False}}, False),
        ({"enabled": True}, True),
        ({"quantize_bits": {"start_bits": 16}}, True),
        ({"enabled": False, "eigenvalue": {"enabled": True}}, True),
    ],
)
def test_quantize_training_is_on(value: dict[str, Any], is_on: bool) -> None:
    assert QuantizeTrainingSection.model_validate(value).is_on() is is_on


def test_a_slip_in_the_eigenvalues_of_quantize_training() -> None:
    problem = only(QuantizeTrainingSection, {"eigenvalue": {"max_iters": 3}, "any": "thing"})
    assert (problem.path, problem.fix) == ("eigenvalue.max_iters", 'did you mean "max_iter"?')


def test_sparse_attention() -> None:
    assert SparseAttentionSection().model_dump() == {
        "mode": "fixed",
        "block": 16,
        "different_layout_per_head": False,
        "num_local_blocks": 4,
        "num_global_blocks": 1,
        "attention": "bidirectional",
        "horizontal_global_attention": False,
        "num_different_global_patterns": 1,
        "num_random_blocks": 0,
        "local_window_blocks": (4,),
        "global_block_indices": (0,),
        "global_block_end_indices": None,
        "num_sliding_window_blocks": 3,
    }


def test_sparse_attention_is_read_and_not_refused() -> None:
    assert SparseAttentionSection.comes_with == ""
    assert "no attention is replaced" in SparseAttentionSection.no_effect
    assert SparseAttentionSection(mode="bigbird").is_on()
    assert not SparseAttentionSection(mode="fixed", block=16).is_on()


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("mode", "zork", 'got "zork", allowed are "fixed", "dense", "variable", "bigbird" or "bslongformer"'),
        ("attention", "both", 'got "both", allowed are "bidirectional" or "unidirectional"'),
        ("block", 0, "got 0, must be at least 1"),
        ("local_window_blocks", 4, "got 4, must be a list"),
    ],
)
def test_sparse_attention_bad_values(key: str, value: Any, text: str) -> None:
    problem = only(SparseAttentionSection, {key: value})
    assert (problem.path, problem.text) == (key, text)
