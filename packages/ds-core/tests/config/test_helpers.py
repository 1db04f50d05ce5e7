"""DeepSpeed's config_utils: the mutable base model and the small helpers."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from enum import Enum
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from ds_core.config import (
    ConfigError,
    DeepSpeedConfigModel,
    DeepSpeedConfigObject,
    ScientificNotationEncoder,
    dict_raise_error_on_duplicate_keys,
    get_config_default,
    get_dict_param,
    get_list_param,
    get_scalar_param,
    pp_int,
)


class Device(Enum):
    cpu = "cpu"
    none = "none"


class Parallel(DeepSpeedConfigModel):
    tp_size: int = 1
    group: object = None
    old_size: int = Field(1, json_schema_extra={"deprecated": True, "new_param": "tp_size"})


class Model(DeepSpeedConfigModel):
    parallel: Parallel = Field({}, alias="tp")
    device: Device = Device.none
    reduce_size: int = Field(5, alias="reduce_bucket_size")
    offload: dict[str, Any] | None = None
    maybe: Parallel | None = None
    mp_size: int = Field(1, json_schema_extra={"deprecated": True, "new_param": "parallel.tp_size"})
    cpu_offload: bool = Field(
        False,
        json_schema_extra={
            "deprecated": True,
            "deprecated_msg": "it was one switch",
            "new_param": "offload",
            "new_param_fn": lambda value: {"device": "cpu"} if value else None,
        },
    )
    only_warns: int = Field(
        0, json_schema_extra={"deprecated": True, "new_param": "reduce_size", "set_new_param": False}
    )
    no_replacement: int = Field(0, json_schema_extra={"deprecated": True, "deprecated_msg": "nothing reads it"})
    into_maybe: int = Field(0, json_schema_extra={"deprecated": True, "new_param": "maybe.tp_size"})


class Required(DeepSpeedConfigModel):
    size: int
    mode: str = "auto"


def test_names_and_aliases() -> None:
    assert Model(reduce_size=5e8).reduce_size == Model(reduce_bucket_size="500000000").reduce_size == 500_000_000
    assert Model(tp={"tp_size": 4}).parallel.tp_size == Model(parallel=Parallel(tp_size=4)).parallel.tp_size == 4


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"zork": 1}, ("zork",)),
        ({"tp": {"zork": 1}}, ("tp", "zork")),
        ({"reduce_size": 1, "reduce_bucket_size": 1}, ("reduce_size",)),
        ({"reduce_size": 1.5}, ("reduce_size",)),
        ({"reduce_bucket_size": 1.5}, ("reduce_bucket_size",)),
        ({"device": "gpu"}, ("device",)),
        ({"zork": "auto"}, ("zork",)),
    ],
)
def test_refused(data: dict[str, Any], where: tuple[str, ...]) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        Model(**data)
    assert [error["loc"] for error in caught.value.errors()] == [where]


def test_auto_is_the_default_at_every_depth() -> None:
    model = Model(reduce_bucket_size="auto", device="auto", tp={"tp_size": "auto"})
    assert (model.reduce_size, model.device, model.parallel.tp_size) == (5, "none", 1)
    assert model.model_fields_set == {"parallel"}
    assert Model.model_validate({"tp": {"tp_size": "auto"}, "reduce_size": "auto"}).reduce_size == 5


def test_auto_where_a_value_is_needed_or_strict() -> None:
    with pytest.raises(pydantic.ValidationError, match="size"):
        Required(size="auto")
    assert Required(size=2, mode="auto").mode == "auto"
    with pytest.raises(pydantic.ValidationError, match="reduce_bucket_size"):
        Model(strict=True, reduce_bucket_size="auto")


def test_assignment_is_validated() -> None:
    model = Model()
    model.reduce_size = "7"
    model.device = Device.cpu
    assert (model.reduce_size, model.device) == (7, "cpu")
    for name, value in (("reduce_size", "many"), ("zork", 1)):
        with pytest.raises(pydantic.ValidationError):
            setattr(model, name, value)
    assert model.reduce_size == 7


def test_defaults_are_validated() -> None:
    class Wrong(DeepSpeedConfigModel):
        size: int = "many"  # type: ignore[assignment]

    with pytest.raises(pydantic.ValidationError, match="size"):
        Wrong()


def test_two_models_share_no_default() -> None:
    first, second = Model(), Model()
    first.parallel.tp_size = 3
    assert second.parallel.tp_size == 1


def test_a_deprecated_field_moves(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ds_core"):
        model = Model(mp_size=2, cpu_offload=True)
    assert model.parallel.tp_size == 2
    assert model.offload == {"device": "cpu"}
    assert not hasattr(model, "mp_size")
    assert not hasattr(model, "cpu_offload")
    assert {"offload"} <= model.model_fields_set
    assert not {"mp_size", "cpu_offload"} & model.model_fields_set
    assert sorted(caplog.messages) == [
        "Model: cpu_offload is deprecated; use offload instead: it was one switch",
        "Model: mp_size is deprecated; use parallel.tp_size instead",
    ]
    assert "mp_size" not in repr(model)


def test_a_deprecated_field_that_is_not_used_stays_quiet(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ds_core"):
        assert Model(reduce_size=1).mp_size == 1
        assert Model(mp_size="auto").parallel.tp_size == 1
    assert caplog.messages == []


def test_some_deprecated_fields_only_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ds_core"):
        model = Model(only_warns=3, no_replacement=4)
    assert (model.only_warns, model.no_replacement, model.reduce_size) == (3, 4, 5)
    assert sorted(caplog.messages) == [
        "Model: no_replacement is deprecated: nothing reads it",
        "Model: only_warns is deprecated; use reduce_size instead",
    ]


def test_a_deprecated_field_of_a_nested_model_moves() -> None:
    assert Model(tp={"old_size": 6}).parallel.tp_size == 6


def test_old_and_new_together_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        Model(mp_size=2, parallel={"tp_size": 2})
    assert str(caught.value) == (
        "mp_size, which is deprecated, and its replacement parallel.tp_size are both given\n"
        "  where: Model\n"
        "  fix: remove mp_size"
    )
    assert Model(mp_size=2, parallel={"group": 1}).parallel.tp_size == 2
    with pytest.raises(pydantic.ValidationError, match="old_size, which is deprecated, and its replacement tp_size"):
        Model(tp={"old_size": 2, "tp_size": 2})


def test_a_replacement_whose_section_is_missing() -> None:
    with pytest.raises(ConfigError, match="into_maybe is deprecated, and maybe, which holds its replacement") as caught:
        Model(into_maybe=2)
    assert caught.value.fix == "give maybe.tp_size instead"
    assert Model(into_maybe=2, maybe={}).maybe.tp_size == 2


def test_a_replacement_is_validated() -> None:
    class Wrong(DeepSpeedConfigModel):
        size: int = 1
        old: str = Field("", json_schema_extra={"deprecated": True, "new_param": "size"})

    with pytest.raises(pydantic.ValidationError, match="size"):
        Wrong(old="many")


def test_assigning_a_deprecated_field_moves_it_too(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(parallel={"tp_size": 2})
    with caplog.at_level(logging.WARNING, "ds_core"):
        model.mp_size = "4"
    assert model.parallel.tp_size == 4
    assert not hasattr(model, "mp_size")
    assert caplog.messages == ["Model: mp_size is deprecated; use parallel.tp_size instead"]


def test_a_model_whose_field_moved_can_be_dumped_and_copied() -> None:
    model = Model(mp_size=2)
    assert model.model_dump()["parallel"]["tp_size"] == 2
    assert "mp_size" not in model.model_dump()
    assert model.model_copy(deep=True) == model


def test_get_config_default() -> None:
    assert get_config_default(Model, "reduce_size") == 5
    with pytest.raises(ConfigError, match=r"Required\.size must be given"):
        get_config_default(Required, "size")
    with pytest.raises(ConfigError, match="Model has no field 'reduce_siz'") as caught:
        get_config_default(Model, "reduce_siz")
    assert caught.value.fix == "did you mean 'reduce_size'?"


@pytest.mark.parametrize("get", [get_scalar_param, get_list_param, get_dict_param])
def test_get_param(get: Any) -> None:
    assert get({"a": [1]}, "a", None) == [1]
    assert get({"a": None}, "a", 1) is None
    assert get({"a": 0}, "b", {"c": 1}) == {"c": 1}


def test_pp_int() -> None:
    number = pp_int(1e9)
    assert (number, number + 1, repr(number), str(number)) == (10**9, 10**9 + 1, "1,000,000,000", "1,000,000,000")
    assert (repr(pp_int(7, "seven")), pp_int(7, "seven") == 7) == ("seven", True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@given(value=JSON, indent=st.sampled_from([None, 0, 2, "\t"]), sort_keys=st.booleans())
def test_scientific_notation_loads_as_the_same_values(value: Any, indent: Any, sort_keys: bool) -> None:
    text = json.dumps(value, cls=ScientificNotationEncoder, indent=indent, sort_keys=sort_keys)
    # Whole numbers come back as floats; every value is the float that is closest to it.
    assert json.loads(text) == json.loads(json.dumps(value), parse_int=lambda digits: near(int(digits)))


def near(number: int) -> int | float:
    return float(number) if abs(number) > 1000 else number


def test_scientific_notation_has_the_layout_of_json() -> None:
    small = {"b": [1, {"c": []}, {}, "é\n"], "a": None, 3: True, "x": -0.5}
    for options in ({}, {"indent": 4}, {"ensure_ascii": False}, {"separators": (",", ":")}):
        assert json.dumps(small, cls=ScientificNotationEncoder, **options) == json.dumps(small, **options)
    assert json.dumps([1000, 1001, -1e4, 123456789, 0.1, math.inf, True], cls=ScientificNotationEncoder) == (
        "[1000, 1.001e+3, -1e+4, 1.23456789e+8, 0.1, Infinity, true]"
    )
    with pytest.raises(TypeError, match="not JSON serializable"):
        json.dumps({"a": object()}, cls=ScientificNotationEncoder)


def test_config_object_prints_as_json() -> None:
    class Probe(DeepSpeedConfigObject):
        def __init__(self, inner: Any) -> None:
            self.size = 5_000_000
            self.inner = inner

    assert json.loads(repr(Probe(Probe(Device)))) == {"size": 5e6, "inner": {"size": 5e6, "inner": str(Device)}}
    assert Probe(1).repr() == {"size": 5_000_000, "inner": 1}


def test_duplicate_keys_are_named() -> None:
    def load(text: str) -> Any:
        return json.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys)

    assert load('{"a": {"a": 1}, "b": 2}') == {"a": {"a": 1}, "b": 2}
    with pytest.raises(ConfigError, match="keys given twice in one object: a, c\n"):
        load('{"x": {"a": 1, "b": 2, "a": 3, "c": 1, "c": 1}}')


def test_they_are_imported_on_use() -> None:
    program = (
        "import sys, ds_core.config\n"
        "here = [name for name in ('helpers', 'inference_loading') if f'ds_core.config.{name}' in sys.modules]\n"
        "print(here, set(ds_core.config.__all__) <= set(dir(ds_core.config)))\n"
        "for name in ds_core.config.__all__: getattr(ds_core.config, name)\n"
        "print('torch' in sys.modules, hasattr(ds_core.config, 'zork'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("[] True\nFalse False\n", "")
