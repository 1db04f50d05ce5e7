"""The JSON Schema: valid itself, takes what the loader takes, and refuses what the loader refuses for its form."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from ds_core.config import ConfigError, find_problems
from ds_core.config.catalog import all_sections
from ds_core.config.migrate import DEPRECATED
from ds_core.config.schema import json_schema
from ds_core.config.sections.arguments import ARGUMENTS

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
CLIENTS = sorted((HERE / "clients").glob("*.json"))
WILD = sorted((HERE.parents[3] / "shared" / "fixtures" / "configs").glob("*.json"))


@cache
def schema() -> dict[str, Any]:
    return json_schema()


@cache
def validator() -> Draft202012Validator:
    return Draft202012Validator(schema())


def is_valid(config: Any) -> bool:
    return bool(validator().is_valid(config))


def objects(found: Any) -> Iterator[dict[str, Any]]:
    """Yield the schema of every object with keys of ours."""
    for part in (found, *found["$defs"].values()):
        yield part["properties"]


def test_it_is_a_schema() -> None:
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema())
    assert json.loads(json.dumps(schema(), allow_nan=False)) == schema()


def test_every_section_is_there() -> None:
    assert set(all_sections()) <= set(schema()["properties"])


def test_every_key_has_a_description() -> None:
    missing = [key for properties in objects(schema()) for key, value in properties.items() if not value["description"]]
    assert not missing


@pytest.mark.parametrize(
    "section", ["zero_optimization", "optimizer", "compression_training", "gradient_clipping", "bfloat16"]
)
def test_schema_of_one_key(section: str) -> None:
    one = json_schema(section)
    Draft202012Validator.check_schema(one)
    assert one["title"] == section
    # Nothing that is not needed, and all that is: an unknown reference raises.
    Draft202012Validator(one).is_valid({"enabled": True, "no such key": 1})
    assert len(one["$defs"]) < len(schema()["$defs"])


def test_unknown_section() -> None:
    with pytest.raises(ConfigError) as caught:
        json_schema("zero_optimisation")
    assert caught.value.fix == "did you mean 'zero_optimization'?"


def test_description_says_default_and_state() -> None:
    properties = schema()["properties"]
    assert properties["sparse_gradients"]["description"] == (
        "Reduce gradients of embeddings as sparse tensors. Default: `false`. "
        "Only `false` is accepted: anything else asks for a thing which is not built yet."
    )
    assert properties["zero_allow_untested_optimizer"]["description"].endswith(
        "Has no effect: every optimizer is allowed."
    )
    assert properties["pipeline"]["description"].endswith(
        "Not built yet, refused while it is on: comes with a later release of ds-pipe."
    )
    zero = schema()["$defs"]["ZeroSection"]["properties"]
    assert zero["sub_group_size"]["description"] == (
        "Elements updated at once (stage 3). Default: `1000000000`. May have no effect: only stage 3 reads it."
    )


def test_other_names_are_valid_and_not_offered() -> None:
    zero = schema()["$defs"]["ZeroSection"]["properties"]
    assert "doNotSuggest" not in zero["stage3_prefetch_bucket_size"]
    for other in ("prefetch_bucket_size", "prefetch_bucket_numel"):
        assert zero[other]["doNotSuggest"]
        assert zero[other]["description"] == "The same as `stage3_prefetch_bucket_size`."


@pytest.mark.parametrize("row", DEPRECATED, ids=lambda row: row.old)
def test_deprecated_keys_are_marked(row: Any) -> None:
    holder = json_schema(row.section[0])["$defs"] if row.section else {"": schema()}
    (found,) = (part["properties"][row.old] for part in holder.values() if row.old in part["properties"])
    assert found["deprecated"]
    assert found["deprecationMessage"] == f"Deprecated: write {row.instead}."


@pytest.mark.parametrize("path", [*CLIENTS, *WILD], ids=lambda path: path.name)
def test_what_loads_strictly_is_valid(path: Path) -> None:
    try:
        # Infinity is no JSON; the loader takes it as text, too.
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
    except json.JSONDecodeError:
        pytest.skip("HJSON, which editors read as a language of its own")
    unbuilt = ("not built", "later release")
    if all(any(word in problem.text for word in unbuilt) for problem in find_problems(config)):
        assert [error.message for error in validator().iter_errors(config)] == []


def test_the_clients_are_there() -> None:
    assert len(CLIENTS) > 20


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"$schema": "./ds.schema.json", "train_batch_size": 8},
        {"train_batch_size": "auto", "gradient_accumulation_steps": "2", "train_micro_batch_size_per_gpu": None},
        {"zero_optimization": True, "allgather_size": 5e8},
        {"zero_optimization": {"stage": "2", "reduce_bucket_size": 5e8, "cpu_offload": True, "overlap_comm": "true"}},
        {"fp16": "auto", "bf16": None, "communication_data_type": "fp32", "log_level": "DEBUG"},
        {"optimizer": {"type": "ADAMW", "params": {"lr": "auto", "betas": [0.9, 0.999]}}},
        {"optimizer": {"type": "SGD", "params": {"lr": 1, "whatever": [1]}}},
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}},
        {"checkpoint": {"engine": "mine", "mine": {"writers": 4}}, "fp16": {"loss_scale": "128"}},
        {"compression_training": {"row_pruning": {"different_groups": {"a": {"params": {"dense_ratio": 0.5}}}}}},
    ],
    ids=str,
)
def test_valid(config: dict[str, Any]) -> None:
    assert [problem for problem in find_problems(config) if not problem.text.startswith("this section")] == []
    assert [error.message for error in validator().iter_errors(config)] == []


@pytest.mark.parametrize(
    "config",
    [
        [],
        {"zero_optimisation": {"stage": 2}},
        {"stage": 2},
        {"train_batch_size": 0},
        {"train_batch_size": 1.5},
        {"gradient_clipping": True},
        {"gradient_clipping": "much"},
        {"fp16": {"enabld": True}},
        {"fp16": {"enabled": "maybe"}},
        {"fp16": True},
        {"zero_optimization": {"stage": 4}},
        {"zero_optimization": {"cpu_offload": 1}},
        {"zero_optimization": {"offload_param": {"device": "disk"}}},
        {"zero_optimization": {"offload_optimizer": {"ratio": 1.5}}},
        {"checkpoint": {"tag_validation": "Sometimes"}},
        {"checkpoint": {"mine": 4}},
        {"communication_data_type": "fp8"},
        {"optimizer": {"params": {"lr": 1e-3}}},
        {"optimizer": {"type": "Adam", "params": {"learning_rate": 1e-3}}},
        {"optimizer": {"type": "Adam", "params": {"lr": "1e-3"}}},
        {"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}},
        {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10}}},
        {"compression_training": {"row_pruning": {"different_groups": {"a": {"params": {"dense_ratio": 5}}}}}},
    ],
    ids=str,
)
def test_invalid(config: Any) -> None:
    assert not is_valid(config)
    if isinstance(config, dict):
        assert find_problems(config)


SAMPLES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 7, 0.5, "auto", "text", "1", "true", ""),
    *([], [1], ["a"], [0.5, 0.5], {}, {"no such key": 1}),
)


def places() -> Iterator[tuple[str, Any]]:
    """Yield dotted path and a function from a value to a configuration that has it there, for every key there is."""
    yield from _places(schema(), (), lambda inner: inner, set())
    for section_name, models in ARGUMENTS.items():
        for word, model in models.items():
            needed = {name: "auto" for name, info in model.model_fields.items() if info.is_required()}
            for key in model.fields_by_key():
                yield (
                    f"{section_name}.params.{key}",
                    lambda value, at=section_name, type_=word, key=key, needed=needed: {
                        at: {"type": type_, "params": {**needed, key: value}}
                    },
                )


def _places(part: dict[str, Any], before: tuple[str, ...], wrap: Any, seen: set[str]) -> Iterator[tuple[str, Any]]:
    for key, value in part["properties"].items():
        needed = {name: "AdamW" for name in part.get("required", ()) if name != key}

        def put(inner: Any, key: str = key, needed: dict[str, Any] = needed) -> Any:
            return wrap({**needed, key: inner})

        if key != "$schema":  # the loader does not look at it
            yield ".".join((*before, key)), put
        for inner, nest in (
            (value, lambda deep: deep),
            (value.get("additionalProperties"), lambda deep: {"some": deep}),
            (value.get("items"), lambda deep: [deep]),
        ):
            if isinstance(inner, dict) and "$ref" in inner and inner["$ref"] not in seen:
                seen.add(inner["$ref"])  # each section once, wherever it may stand
                definition = schema()["$defs"][inner["$ref"].rpartition("/")[2]]
                yield from _places(definition, (*before, key), lambda deep, put=put, nest=nest: put(nest(deep)), seen)


OF_FORM = (
    "must be true or false",
    "must be text",
    "must not be empty",
    "must be a list",
    "must be an object",
    "must be a whole number",
    "must be a finite number",
    "must be at least",
    "must be at most",
    "must be more than",
    "must be less than",
    "allowed are",
    "unknown key",
)
"""What the loader says where the form of a value is wrong."""
BEYOND = {"elasticity.version", "pipeline.partition"}
"""Keys whose own validators say the same of what a schema cannot tell."""


@cache
def all_places() -> tuple[tuple[str, Any], ...]:
    return tuple(places())


def disagreement(place: int, sample: Any) -> str | None:
    """Return how schema and loader differ on ``sample`` at a place; None where they agree."""
    path, put = all_places()[place]
    config = put(sample)
    problems = find_problems(config)
    refused = [
        problem
        for problem in problems
        if path not in BEYOND
        and any(words in problem.text for words in OF_FORM)
        # Bounds of a number in quotes are left to the loader.
        and sample != "1"
    ]
    is_right = is_valid(config)
    if is_right and refused:
        return f"valid, but refused: {config}: {refused[0]}"
    return None if is_right or problems else f"loads, but not valid: {config}"


@settings(max_examples=300, deadline=None)
@given(place=st.deferred(lambda: st.sampled_from(range(len(all_places())))), sample=st.sampled_from(SAMPLES))
def test_one_value_is_valid_if_it_loads_and_invalid_if_its_form_is_refused(place: int, sample: Any) -> None:
    assert disagreement(place, sample) is None


@pytest.mark.slow
def test_schema_and_loader_agree_on_every_key() -> None:
    wrong = [disagreement(place, sample) for place in range(len(all_places())) for sample in SAMPLES]
    assert [text for text in wrong if text] == []
    assert len(wrong) > 10_000
