"""The techniques of ``compression_training``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ds_core.config.problems import Problem, validate
from ds_core.config.sections import techniques
from ds_core.config.sections.compression import CompressionTrainingSection
from ds_core.testing.config import SectionContract

if TYPE_CHECKING:
    from ds_core.config import Section


class TestContract(SectionContract):
    @pytest.fixture(params=[name for name in techniques.__all__ if name != "Names"])
    def section_class(self, request: pytest.FixtureRequest) -> type[Section]:
        return getattr(techniques, request.param)


PARAMS: dict[str, dict[str, Any]] = {
    "weight_quantization": {"start_bits": 8, "target_bits": 4},
    "activation_quantization": {"bits": 8},
    "sparse_pruning": {"dense_ratio": 0.5},
    "row_pruning": {"dense_ratio": 0.5},
    "head_pruning": {"dense_ratio": 0.5},
    "channel_pruning": {"dense_ratio": 0.5},
}
"""Technique -> what the ``params`` of a group need."""


def technique(name: str, **shared: Any) -> dict[str, Any]:
    """Return a section in which technique ``name`` is on and whole."""
    shared = {"enabled": True, **({"num_heads": 12} if name == "head_pruning" else {}), **shared}
    groups = {"mine": {"params": PARAMS[name], "modules": ["attention"]}}
    return {name: {"shared_parameters": shared, "different_groups": groups}}


def with_params(params: Any, name: str, **shared: Any) -> dict[str, Any]:
    """Return a section in which the one group of technique ``name`` has these ``params``."""
    value = technique(name, **shared)
    value[name]["different_groups"]["mine"]["params"] = params
    return value


def only(value: dict[str, Any]) -> Problem:
    _, (problem,) = validate(CompressionTrainingSection, value)
    return problem


SHARED: dict[str, dict[str, Any]] = {
    "weight_quantization": {
        "enabled": False,
        "quantizer_kernel": False,
        "schedule_offset": 0,
        "quantize_groups": 1,
        "quantize_verbose": False,
        "quantization_type": "symmetric",
        "rounding": "nearest",
        "quantize_weight_in_forward": False,
        "fp16_mixed_quantize": {"enabled": False, "quantize_change_ratio": 0.001},
    },
    "activation_quantization": {
        "enabled": False,
        "quantization_type": "symmetric",
        "range_calibration": "dynamic",
        "schedule_offset": 1000,
    },
    "sparse_pruning": {
        "enabled": False,
        "method": "l1",
        "schedule_offset": 1000,
        "schedule_offset_end": None,
        "schedule_offset_stride": 1,
        "block_pattern": "4x1",
        "dense_ratio": 0.1,
        "excluded_modules": (),
    },
    "row_pruning": {"enabled": False, "method": "l1", "schedule_offset": 1000},
    "channel_pruning": {"enabled": False, "method": "l1", "schedule_offset": 1000},
    "head_pruning": {"enabled": False, "method": "topk", "schedule_offset": 1000, "num_heads": None},
}


@pytest.mark.parametrize("name", PARAMS)
def test_defaults(name: str) -> None:
    section = getattr(CompressionTrainingSection(), name)
    assert section.model_dump() == {"shared_parameters": SHARED[name], "different_groups": {}}


@pytest.mark.parametrize("name", PARAMS)
def test_a_whole_one(name: str) -> None:
    section, problems = validate(CompressionTrainingSection, technique(name))
    assert problems == []
    assert section is not None
    group = getattr(section, name).different_groups["mine"]
    assert (group.modules, group.related_modules) == (("attention",), None)
    assert all(getattr(group.params, key) == value for key, value in PARAMS[name].items())


@pytest.mark.parametrize("name", PARAMS)
def test_an_enabled_one_needs_groups(name: str) -> None:
    value = technique(name)
    del value[name]["different_groups"]
    problem = only(value)
    assert problem.path == f"{name}.different_groups"
    assert problem.text.startswith("is missing")
    assert problem.fix == 'add "different_groups"'
    value[name]["shared_parameters"]["enabled"] = False
    assert validate(CompressionTrainingSection, value)[1] == []


@pytest.mark.parametrize("name", PARAMS)
def test_an_enabled_one_needs_its_params(name: str) -> None:
    for params in ({}, None):
        _, problems = validate(CompressionTrainingSection, with_params(params, name))
        assert [problem.path for problem in problems] == [
            f"{name}.different_groups.mine.params.{key}" for key in PARAMS[name]
        ]
        assert all(problem.text.startswith("is missing") for problem in problems)
        assert validate(CompressionTrainingSection, with_params(params, name, enabled=False))[1] == []


@pytest.mark.parametrize("groups", [3, [], "x", {"mine": 3}, {"mine": {"params": 3}}, {3: {}}])
def test_what_is_no_group_is_told(groups: object) -> None:
    value = technique("row_pruning")
    value["row_pruning"]["different_groups"] = groups
    assert validate(CompressionTrainingSection, value)[1] != []


@pytest.mark.parametrize("name", PARAMS)
def test_an_unknown_key_in_a_group(name: str) -> None:
    problem = only({name: {"different_groups": {"mine": {"parms": {}}}}})
    assert problem.path == f"{name}.different_groups.mine.parms"
    assert problem.fix == 'did you mean "params"?'
    problem = only({name: {"different_groups": {"mine": {"params": {"zork": 1}}}}})
    assert problem.path == f"{name}.different_groups.mine.params.zork"
    assert problem.fix is not None
    assert all(key in problem.fix for key in PARAMS[name])


def test_snip_momentum_has_one_ratio_for_all() -> None:
    value = with_params({}, "sparse_pruning", method="snip_momentum")
    assert validate(CompressionTrainingSection, value)[1] == []


def test_heads_are_counted() -> None:
    problem = only(technique("head_pruning", num_heads=None))
    assert problem.path == "head_pruning.shared_parameters.num_heads"
    assert problem.text.startswith("is missing")


@pytest.mark.parametrize(
    ("name", "key", "allowed"),
    [
        ("weight_quantization", "quantization_type", '"symmetric" or "asymmetric"'),
        ("weight_quantization", "rounding", '"nearest" or "stochastic"'),
        ("activation_quantization", "quantization_type", '"symmetric" or "asymmetric"'),
        ("activation_quantization", "range_calibration", '"dynamic" or "static"'),
        ("sparse_pruning", "method", '"l1", "topk" or "snip_momentum"'),
        ("row_pruning", "method", '"l1" or "topk"'),
        ("channel_pruning", "method", '"l1" or "topk"'),
        ("head_pruning", "method", '"topk"'),
    ],
)
def test_words(name: str, key: str, allowed: str) -> None:
    problem = only({name: {"shared_parameters": {key: "zork"}}})
    assert problem.path == f"{name}.shared_parameters.{key}"
    expected = f"allowed are {allowed}" if " or " in allowed else f"only {allowed} is allowed"
    assert problem.text == f'got "zork", {expected}'


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("weight_quantization", {"schedule_offset": -1}),
        ("weight_quantization", {"quantize_groups": 0}),
        ("weight_quantization", {"quantizer_kernel": "maybe"}),
        ("sparse_pruning", {"dense_ratio": 0}),
        ("sparse_pruning", {"dense_ratio": 1}),
        ("sparse_pruning", {"block_pattern": ""}),
        ("sparse_pruning", {"schedule_offset_stride": 0}),
        ("head_pruning", {"num_heads": 0}),
    ],
)
def test_bounds(name: str, shared: dict[str, Any]) -> None:
    (key,) = shared
    assert only({name: {"shared_parameters": shared}}).path == f"{name}.shared_parameters.{key}"


@pytest.mark.parametrize(
    ("written", "modules"),
    [({}, ("*",)), ({"modules": "*"}, ("*",)), ({"modules": "head"}, ("head",)), ({"modules": ["a", "b"]}, ("a", "b"))],
)
def test_modules_are_names(written: dict[str, Any], modules: tuple[str, ...]) -> None:
    assert techniques.PruningGroupSection.model_validate(written).modules == modules


@pytest.mark.parametrize(
    ("written", "related"),
    [(None, None), ("a", (("a",),)), (["a", "b"], (("a",), ("b",))), ([["a", "b"], ["c"]], (("a", "b"), ("c",)))],
)
def test_related_modules_are_lists_of_names(written: Any, related: Any) -> None:
    assert techniques.PruningGroupSection.model_validate({"related_modules": written}).related_modules == related


@pytest.mark.parametrize(("key", "value"), [("modules", 3), ("modules", [3]), ("related_modules", [[3]])])
def test_modules_that_are_no_names(key: str, value: Any) -> None:
    problem = only({"row_pruning": {"different_groups": {"mine": {key: value}}}})
    assert problem.path.startswith(f"row_pruning.different_groups.mine.{key}")


def test_an_editor_offers_both_forms_of_modules() -> None:
    schema = techniques.PruningGroupSection.model_json_schema(by_alias=True)
    assert [form["type"] for form in schema["properties"]["modules"]["anyOf"]] == ["string", "array"]
