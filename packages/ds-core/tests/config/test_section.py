"""What a section accepts as a key, a number, a dtype, and ``"auto"``."""

from __future__ import annotations

import enum
from typing import Annotated, Any

import numpy
import pytest
import torch
from pydantic import ValidationError

from ds_core.config import Config, Count, DtypeName, Int, NotBuilt, Number, PositiveInt, Section, catalog, key
from ds_core.config.config import BatchKeys
from ds_core.config.paths import sections_of
from ds_core.config.problems import validate
from ds_core.config.section import NeededWhenOn, Secret, show
from ds_core.config.showing import is_secret


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


@pytest.mark.parametrize("value", [1.5, "1.5", True, False, "two", "", [], {}, float("inf"), float("nan"), "inf"])
def test_not_whole_numbers(value: Any) -> None:
    assert problem_of(whole=value) == f"whole: got {show(value)}, must be a whole number"


@pytest.mark.parametrize("value", [0.25, "0.25", numpy.float32(0.25), torch.tensor(0.25)])
def test_numbers(value: Any) -> None:
    assert sample(ratio=value).ratio == 0.25


@pytest.mark.parametrize("value", [True, "half", float("inf"), float("nan"), 10**400, -(10**400)])
def test_not_numbers(value: Any) -> None:
    assert problem_of(ratio=value) == f"ratio: got {show(value)}, must be a finite number"


@pytest.mark.parametrize("value", ["fp16", "half", "float16", "torch.float16", torch.float16])
def test_dtype_names(value: Any) -> None:
    assert sample(dtype=value).dtype == "float16"


@pytest.mark.parametrize("value", ["int8", torch.int8, 16])
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


def test_null_means_that_a_key_is_not_given() -> None:
    class Optional(Section):
        count: Count = 2
        switch: bool = True
        words: tuple[str, ...] = ("a",)
        inner: Inner = Inner()
        perhaps: Annotated[Count | None, NotBuilt(None, 7)] = 7
        anything: Any = 3
        needed: str

    null = dict.fromkeys(("count", "switch", "words", "inner", "perhaps", "anything"))
    section = Optional.model_validate({**null, "needed": "x"})
    assert (section.count, section.switch, section.words, section.inner) == (2, True, ("a",), Inner())
    # Where the type takes null, it is a value.
    assert (section.perhaps, section.anything) == (None, None)
    assert section.model_fields_set == {"perhaps", "anything", "needed"}
    _, (problem,) = validate(Optional, null | {"needed": None})
    assert (problem.path, problem.text) == ("needed", "is missing")
    _, (problem,) = validate(Optional, {"needed": "x", "zork": None})
    assert (problem.path, problem.kind) == ("zork", "unknown")


class Wanting(Section):
    """A section with keys that are needed while it is on."""

    enabled: bool = False
    """The switch."""
    bucket_numel: Annotated[Count, NeededWhenOn()] = key("bucket_size", "numel", default=5)
    """Elements."""
    words: Annotated[tuple[str, ...], NeededWhenOn()] = ("a",)
    """Words."""
    depth: Count = 2
    """Another key."""


@pytest.mark.parametrize("absent", [{}, {"bucket_size": None, "words": "auto"}, {"numel": None}])
@pytest.mark.parametrize("on", [True, "true", 1])
def test_keys_that_are_needed_while_the_section_is_on(absent: dict[str, Any], on: Any) -> None:
    given = {**absent, "depth": -1}
    _, problems = validate(Wanting, {"enabled": on, **given})
    assert [(problem.path, problem.fix) for problem in problems[:2]] == [
        ("bucket_size", 'add "bucket_size"'),
        ("words", 'add "words"'),
    ]
    assert all(problem.text.startswith("is missing") for problem in problems[:2])
    assert [problem.path for problem in problems[2:]] == ["depth"]  # told beside them
    for off in ({}, {"enabled": False}, {"enabled": "auto"}, {"enabled": None}):
        assert Wanting.model_validate({**absent, **off}) == Wanting()


@pytest.mark.parametrize("name", ["bucket_size", "numel", "bucket_numel"])
def test_a_needed_key_under_any_of_its_names(name: str) -> None:
    section = Wanting.model_validate({"enabled": True, name: 9, "words": []})
    assert (section.bucket_numel, section.words) == (9, ())


class Account(Section):
    """A section with secrets."""

    pin: Annotated[str | None, Secret()] = None
    """A secret that does not sound like one."""
    name: str = "me"
    """None."""


def test_secrets_are_not_shown() -> None:
    account = Account(pin="1234", name="you")
    assert (account.pin, repr(account)) == ("1234", "Account(pin='...', name='you')")
    assert repr(Account()) == "Account(pin=None, name='me')"
    assert Account.shown("pin", "1234") == Account.shown("pin", 1234) == '"..."'
    assert (Account.shown("pin", None), Account.shown("name", "you")) == ("null", '"you"')
    assert (Account.shown("api_keey", "1234"), Account.shown("zork", "1234")) == ('"..."', '"1234"')
    assert Account.shown(3, "1234") == '"1234"'


def test_every_key_that_sounds_like_a_secret_is_marked() -> None:
    sections = {inner for top in catalog.all_sections().values() for inner in all_sections(top)}
    marked = {
        (section.__name__, name, any(isinstance(marker, Secret) for marker in info.metadata), is_secret(name))
        for section in sections
        for name, info in section.model_fields.items()
    }
    assert {row for row in marked if row[2] or row[3]} == {("CometSection", "api_key", True, True)}
