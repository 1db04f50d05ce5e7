"""Types that sections share: one message per value, and a JSON Schema that says what is accepted."""

from __future__ import annotations

from typing import Annotated, Any

import pytest

from ds_core.config import Section
from ds_core.config.problems import validate
from ds_core.config.sections.values import AutoCount, AutoNumber, OneOf, OrSwitch, Pattern


class Inner(Section):
    """A section that is a switch, too."""

    enabled: bool = True
    """On."""
    depth: AutoCount = "auto"
    """Levels."""


class Sample(Section):
    """One key of each type."""

    count: AutoCount = "auto"
    """A whole number."""
    number: AutoNumber = "auto"
    """A number."""
    either: Annotated[str | dict[str, Any] | None, OneOf("must be text or an object")] = None
    """A union."""
    pattern: Pattern = ""
    """A regular expression."""
    inner: Annotated[Inner, OrSwitch()] = Inner()
    """A section, true or false."""


def sample(**values: Any) -> Sample:
    return Sample.model_validate(values)


def problem_of(**values: Any) -> str:
    _, problems = validate(Sample, values)
    (only,) = problems
    return f"{only.path}: {only.text}"


@pytest.mark.parametrize(("value", "meant"), [(3, 3), (4.0, 4), ("5", 5), ("auto", "auto")])
def test_count_or_auto(value: Any, meant: Any) -> None:
    assert sample(count=value).count == meant


@pytest.mark.parametrize("value", [0, 1.5, "many", True])
def test_not_a_count_nor_auto(value: Any) -> None:
    assert problem_of(count=value).endswith('must be a whole number from 1, or "auto"')


@pytest.mark.parametrize(("value", "meant"), [(0.5, 0.5), ("1e3", 1000.0), ("auto", "auto")])
def test_number_or_auto(value: Any, meant: Any) -> None:
    assert sample(number=value).number == meant


@pytest.mark.parametrize("value", [float("inf"), "much", True])
def test_not_a_number_nor_auto(value: Any) -> None:
    assert problem_of(number=value).endswith('must be a finite number, or "auto"')


@pytest.mark.parametrize("value", ["text", {"a": [1]}, None])
def test_either(value: Any) -> None:
    assert sample(either=value).either == value


def test_what_fits_no_member_is_one_problem() -> None:
    assert problem_of(either=3) == "either: got 3, must be text or an object"


def test_patterns() -> None:
    assert sample(pattern=r"layers\.\d+$").pattern == r"layers\.\d+$"
    assert problem_of(pattern="(") == (
        'pattern: got "(", must be a regular expression (missing ), unterminated subpattern at position 0)'
    )
    assert "must be a regular expression" in problem_of(pattern="(" * 50_000)


@pytest.mark.parametrize("value", [True, False])
def test_a_switch_is_a_section(value: bool) -> None:
    assert sample(inner=value).inner == Inner(enabled=value)
    assert sample(inner={"enabled": value, "depth": 2}).inner == Inner(enabled=value, depth=2)


def test_neither_switch_nor_section() -> None:
    assert problem_of(inner=3) == "inner: got 3, must be an object { ... }"
    assert problem_of(inner={"depth": 0}).startswith("inner.depth: got 0")


def test_auto_travels_as_json() -> None:
    given = sample(count="auto", number=2, inner=False)
    assert Sample.model_validate_json(given.model_dump_json()) == given
