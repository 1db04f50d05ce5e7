"""load_inference_config: one loader for training and inference."""

from __future__ import annotations

import base64
import copy
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest

from ds_core.config import ConfigError, load_inference_config
from ds_core.config.reading import read

if TYPE_CHECKING:
    from pathlib import Path

GIVEN: dict[str, Any] = {"tensor_parallel": {"tp_size": 2}, "dtype": "bf16", "max_tokens": 64}
HJSON = """{
  // how the model is divided
  tensor_parallel: {tp_size: 2,}
  dtype: bf16
  max_tokens: 64
}"""


def test_nothing_given_is_the_defaults() -> None:
    section = load_inference_config()
    assert section == load_inference_config({}) == load_inference_config(None)
    assert (section.dtype, section.tensor_parallel.tp_size, section.max_out_tokens) == ("float16", 1, 1024)


def test_every_kind_of_source(tmp_path: Path) -> None:
    expected = load_inference_config(GIVEN)
    assert (expected.tensor_parallel.tp_size, expected.dtype, expected.max_out_tokens) == (2, "bfloat16", 64)
    plain, commented = tmp_path / "plain.json", tmp_path / "commented.hjson"
    plain.write_text(json.dumps(GIVEN))
    commented.write_text(HJSON)
    encoded = base64.urlsafe_b64encode(HJSON.encode()).decode()
    for source in (plain, str(plain), commented, encoded):
        assert load_inference_config(source) == expected
    assert load_inference_config(**GIVEN) == expected
    assert load_inference_config({"dtype": "bf16"}, tp={"tp_size": 2}, max_out_tokens=64) == expected


def test_nothing_is_changed_or_kept() -> None:
    policy = {str: ("out",)}
    given, arguments = copy.deepcopy(GIVEN), {"injection_policy": policy, "moe": {"ep_size": 2}}
    section = load_inference_config(given, **arguments)
    assert given == GIVEN
    assert arguments == {"injection_policy": {str: ("out",)}, "moe": {"ep_size": 2}}
    policy[int] = ("in",)
    given["tensor_parallel"]["tp_size"] = 7
    assert section.injection_policy == {str: ("out",)}
    assert section.tensor_parallel.tp_size == 2


def test_objects_are_passed_through() -> None:
    group = object()
    section = load_inference_config({"tp": {"tp_group": group}}, args=group)
    assert section.tensor_parallel.tp_group is group
    assert section.config is group


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ({"dtype": "bf16"}, {"dtype": "bf16"}),
        ({"dtype": "bf16"}, {"dtype": "torch.bfloat16"}),
        ({"max_tokens": 64}, {"max_out_tokens": 64.0}),
        ({"tp": {"tp_size": 2}}, {"tensor_parallel": {"tp_size": "2"}}),
        ({"moe": True}, {"moe": {"enabled": True}}),
        ({"base_dir": "auto"}, {"base_dir": ""}),
    ],
)
def test_a_key_in_both_that_means_the_same(config: dict[str, Any], arguments: dict[str, Any]) -> None:
    assert load_inference_config(config, **arguments) == load_inference_config(config)


@pytest.mark.parametrize(
    ("config", "arguments", "path", "values"),
    [
        ({"dtype": "bf16"}, {"dtype": "fp16"}, "dtype", ('"fp16"', '"bf16"')),
        ({"max_tokens": 64}, {"max_out_tokens": 65}, "max_tokens", ("65", "64")),
        ({"tp": {"tp_size": 2}}, {"tensor_parallel": {"tp_size": 4}}, "tp", ('{"tp_size": 4}', '{"tp_size": 2}')),
        ({"base_dir": None}, {"base_dir": "/x"}, "base_dir", ('"/x"', "null")),
    ],
)
def test_a_key_in_both_that_does_not(
    config: dict[str, Any], arguments: dict[str, Any], path: str, values: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_inference_config(config, **arguments)
    argument, configured = values
    message = f"{path}: got {argument} as an argument of init_inference, but {configured} in the configuration"
    assert message in caught.value.what


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "inference.json"
    path.write_text('{"dtype": "fp8", "tensor_paralel": {"tp_size": 2}, "base_dir": "/a", "base_dir": "/b"}')
    with pytest.raises(ConfigError) as caught:
        load_inference_config(path, max_tokens=0, base_dir="/c")
    text = str(caught.value)
    assert str(path) in text
    for part in ("dtype", 'did you mean "tensor_parallel"?', "max_tokens: got 0", "given twice", '"/c" as an argument'):
        assert part in text
    assert "5 problems" in text


def test_unreadable_sources(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="file not found"):
        load_inference_config(str(tmp_path / "zork.json"))
    with pytest.raises(ConfigError, match="a configuration must be a dict, a path or base64 text, got int"):
        load_inference_config(3)  # type: ignore[arg-type]


def test_problems_of_deprecated_keys_are_told_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "inference.json"
    path.write_text('{\n"mp_size": 0}')
    with pytest.raises(ConfigError) as caught:
        load_inference_config(path)
    assert caught.value.what == "mp_size: got 0, must be at least 1 (it is read as tensor_parallel.tp_size)"
    assert caught.value.where == f"{path}, line 2, column 1"


def test_a_document_that_was_read_before(tmp_path: Path) -> None:
    path = tmp_path / "inference.json"
    path.write_text(json.dumps(GIVEN))
    document = read(path)
    path.unlink()
    assert load_inference_config(document) == load_inference_config(document) == load_inference_config(GIVEN)
    assert document.raw == GIVEN


def test_the_old_calling_style(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ds_core"):
        section = load_inference_config(mp_size=2, ep_size=4, replace_method="auto", replace_with_kernel_inject=True)
    assert (section.tensor_parallel.tp_size, section.moe.ep_size, section.replace_with_kernel_inject) == (2, 4, True)
    assert caplog.messages == [
        "replace_method is deprecated: remove it",
        'mp_size is deprecated: write "tensor_parallel": {"tp_size": ...}',
        'ep_size is deprecated: write "moe": {"ep_size": ...}',
    ]
    with pytest.raises(ConfigError, match="mp_size"):
        load_inference_config({"tensor_parallel": {"tp_size": 4}}, mp_size=2)
