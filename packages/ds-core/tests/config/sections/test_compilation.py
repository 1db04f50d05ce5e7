"""Section compile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ds_core.config.problems import validate
from ds_core.config.sections.compilation import CompileSection
from ds_core.testing.config import SectionContract

if TYPE_CHECKING:
    from ds_core.config import Section

TRUE = ("offload_activation_pin_memory", "double_buffer", "keep_int_input_tensors")
FALSE = (
    "deepcompile",
    "free_activation",
    "offload_activation",
    "offload_opt_states",
    "symmetric_memory",
    "debug_log",
    "offload_parameters",
    "sync_before_reduce",
    "sync_after_reduce",
    "sync_before_allgather",
    "sync_after_allgather",
    "keep_all_input_tensors",
)
DEFAULTS = {
    **dict.fromkeys(TRUE, True),
    **dict.fromkeys(FALSE, False),
    "free_activation_threshold": 10485760,
    "passes": None,
}


class TestCompileSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return CompileSection


def test_defaults() -> None:
    assert CompileSection().model_dump(by_alias=True) == DEFAULTS
    assert CompileSection.model_validate(DEFAULTS) == CompileSection()


def test_threshold_is_in_bytes() -> None:
    section = CompileSection.model_validate({"free_activation_threshold": "1e6"})
    assert section.free_activation_threshold_bytes == 1_000_000


@pytest.mark.parametrize("given", [{}, {"deepcompile": False, "offload_parameters": True}, {"passes": []}])
def test_off(given: dict[str, Any]) -> None:
    assert not CompileSection.model_validate(given).is_on()


@pytest.mark.parametrize("given", [{"deepcompile": True}, {"passes": ["z1", "z3", "autosp", "autotp"]}])
def test_on(given: dict[str, Any]) -> None:
    assert CompileSection.model_validate(given).is_on()


@pytest.mark.parametrize(
    ("given", "path", "text"),
    [
        ({"passes": ["z2"]}, "passes[0]", 'got "z2", allowed are "z1", "z3", "autosp" or "autotp"'),
        ({"passes": "z1"}, "passes", 'got "z1", must be a list'),
        ({"free_activation_threshold": -1}, "free_activation_threshold", "got -1, must be at least 0"),
    ],
)
def test_what_is_refused(given: dict[str, Any], path: str, text: str) -> None:
    _, (problem,) = validate(CompileSection, given)
    assert (problem.path, problem.text) == (path, text)
