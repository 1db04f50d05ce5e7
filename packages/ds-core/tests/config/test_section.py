"""What a section accepts as a key, a number, a dtype, and ``"auto"``."""

from __future__ import annotations

import enum
from enum import Enum
from typing import Annotated, Any

import numpy
import pytest
import torch
from pydantic import ValidationError

from ds_core.config import Config, Count, DtypeName, Int, NotBuilt, Number, PositiveInt, Section, key
from ds_core.config.config import BatchKeys
from ds_core.config.paths import sections_of
from ds_core.config.problems import validate
from ds_core.config.section import show


class Inner(Section):
    """A section in a section."""

    word: str = "default"
    """Any text."""


class Sample(Section):
    """One key of each kind."""

    needed: str
    """Without a default."""
    whole: Int = 7
    """Any whole number."""
    bucket_numel: Count = key("bucket_size", "old_bucket_size", default=5)
    """Elements."""
    positive: PositiveInt = 1
    """From 1."""
    ratio: Number = 0.5
    """Any number."""
    dtype: DtypeName = "float32"
    """A dtype."""
    later: Annotated[bool, NotBuilt(False)] = False
    """Not built."""
    inner: Inner = Inner()
    """A section."""


def sample(**values: Any) -> Sample:
    return Sample.model_validate({"needed": "x"} | values)


def problem_of(**values: Any) -> str:
    _, problems = validate(Sample, {"needed": "x"} | values)
    (only,) = problems
    return f"{only.path}: {only.text}"


@pytest.mark.parametrize("written", ["bucket_numel", "bucket_size", "old_bucket_size"])
def test_field_name_and_aliases_are_keys(written: str) -> None:
    section = sample(**{written: 9})
    assert section.bucket_numel == 9
    # DeepSpeed's name answers as an attribute too, for code written against it.
    assert getattr(section, written) == 9


@pytest.mark.parametrize("pair", [("bucket_numel", "bucket_size"), ("bucket_size", "old_bucket_size")])
def test_two_names_at_once(pair: tuple[str, str]) -> None:
    assert "means the same" in problem_of(**dict.fromkeys(pair, 1))


@pytest.mark.parametrize(
    ("value", "meaning"),
    [(3, 3), (5e8, 500_000_000), ("2", 2), ("5e8", 500_000_000), (-0.0, 0), (numpy.int64(4), 4), (numpy.float32(4), 4)],
)
def test_whole_numbers(value: Any, meaning: int) -> None:
    whole = sample(whole=value).whole
    assert (whole, type(whole)) == (meaning, int)


@pytest.mark.parametrize("value", [1.5, "1.5", True, False, None, "two", "", [], {}, float("inf"), float("nan"), "inf"])
def test_not_whole_numbers(value: Any) -> None:
    assert problem_of(whole=value) == f"whole: got {show(value)}, must be a whole number"


@pytest.mark.parametrize("value", [0.25, "0.25", numpy.float32(0.25), torch.tensor(0.25)])
def test_numbers(value: Any) -> None:
    assert sample(ratio=value).ratio == 0.25


@pytest.mark.parametrize("value", [True, None, "half", float("inf"), float("nan"), 10**400, -(10**400)])
def test_not_numbers(value: Any) -> None:
    assert problem_of(ratio=value) == f"ratio: got {show(value)}, must be a finite number"


@pytest.mark.parametrize("value", ["fp16", "half", "float16", "torch.float16", torch.float16])
def test_dtype_names(value: Any) -> None:
    assert sample(dtype=value).dtype == "float16"


@pytest.mark.parametrize("value", ["int8", torch.int8, 16, None])
def test_not_a_dtype(value: Any) -> None:
    assert problem_of(dtype=value).endswith('allowed are "float16", "bfloat16" or "float32"')


def test_auto_is_the_default_where_there_is_one() -> None:
    section = sample(whole="auto", bucket_size="auto", dtype="auto", inner={"word": "auto"})
    assert section == sample()
    assert section.model_fields_set == {"needed", "inner"}


def test_auto_without_a_default_is_a_value() -> None:
    assert sample(needed="auto").needed == "auto"


def test_members_of_an_enum_are_their_values() -> None:
    class Word(enum.Enum):
        HALF = "half"

    assert sample(dtype=Word.HALF).dtype == "float16"


def test_not_built_accepts_only_what_changes_nothing() -> None:
    assert sample(later=False).later is False
    assert problem_of(later=True) == "later: got true, which is not built yet; only false is accepted"


def test_a_default_is_validated_like_a_value() -> None:
    class Wrong(Section):
        count: Count = -1

    assert validate(Wrong, {})[1] != []


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        sample().whole = 3  # type: ignore[misc]


def test_no_such_attribute() -> None:
    with pytest.raises(AttributeError, match="zork"):
        sample().zork  # type: ignore[attr-defined]  # noqa: B018


def test_the_data_given_is_not_changed() -> None:
    given = {"needed": "x", "inner": {"word": "auto"}, "whole": "auto"}
    Sample.model_validate(given)
    assert given == {"needed": "x", "inner": {"word": "auto"}, "whole": "auto"}


def all_sections(section: type[Section]) -> set[type[Section]]:
    return {section}.union(*(all_sections(inner) for inner in sections_of(section).values()))


@pytest.mark.parametrize("section", sorted(all_sections(Config) | {BatchKeys}, key=lambda found: found.__name__))
def test_every_key_is_described(section: type[Section]) -> None:
    assert section.__doc__
    assert list(section.descriptions()) == list(section.model_fields)
    assert all(text.endswith(".") for text in section.descriptions().values())


class Color(Enum):
    RED = "red"


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("not now")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [True, None, "x"]}, '{"a": [true, null, "x"]}'),
        ("x" * 100, '"' + "x" * 56 + "..."),
        ({"a": {"b": {"c": {"d": 1}}}}, '{"a": {"b": {"c": {...}}}}'),
        (Color.RED, '"red"'),
        # Python writes no whole number of more than 4300 digits.
        pytest.param(10**5000, "2**16609 or more", id="huge"),
        pytest.param(-(10**5000), "-2**16609 or more", id="hugely negative"),
        (Unshowable(), "an object of type Unshowable"),
    ],
)
def test_show(value: Any, text: str) -> None:
    assert show(value) == text


def test_show_stops_early() -> None:
    # A list that contains itself would never end.
    endless: list[Any] = []
    endless.extend([endless] * 100)
    assert len(show(endless)) == 60


class Switched(Section):
    """A section with a switch."""

    enabled: bool = False
    """The switch."""
    depth: Count = 2
    """Another key."""


@pytest.mark.parametrize(
    ("data", "is_on"),
    [
        ({"enabled": True}, True),
        ({"enabled": 1}, True),
        ({"enabled": "true"}, True),
        ({"enabled": "On"}, True),
        ({"enabled": False}, False),
        ({"enabled": "false"}, False),
        ({"enabled": "auto"}, False),
        ({"enabled": "maybe"}, False),
        ({"enabled": 2}, False),
        ({"enabled": []}, False),
        ({}, False),
        # What else is wrong there does not matter.
        ({"enabled": True, "depth": -1, "zork": 3, 4: 5}, True),
        (None, False),
        (True, False),
        ([("enabled", True)], False),
    ],
)
def test_is_switched_on_by_the_rules_of_the_field(data: Any, is_on: bool) -> None:
    assert Switched.is_switched_on(data) is is_on


def test_a_section_that_is_on_unless_it_is_switched_off() -> None:
    class Always(Section):
        enabled: bool = True

    data = ({}, {"enabled": "auto"}, {"enabled": "no"}, None)
    assert [Always.is_switched_on(each) for each in data] == [True, True, False, False]
    assert Inner.is_switched_on({"enabled": True}) is False
