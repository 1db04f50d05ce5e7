"""Problems inside sections that a field holds several of: by a name of the user's, or in a list."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field

from ds_core.config import Section
from ds_core.config.paths import sections_of
from ds_core.config.problems import validate


class Entry(Section):
    """One of several."""

    depth: int = 1
    """Any number."""


class Holder(Section):
    """Holds them in every way there is."""

    by_name: dict[str, Entry] = Field(default_factory=dict)
    """By a name of the user's."""
    in_list: tuple[Entry, ...] | None = None
    """In a list."""
    inner: Entry = Entry()
    """Alone."""
    free: dict[str, int] = Field(default_factory=dict)
    """No section."""


class Outer(Section):
    """Holds holders."""

    holders: dict[str, Holder] = Field(default_factory=dict)
    """By a name of the user's."""


def problem(model: type[Section], data: Any) -> tuple[str, str, str | None]:
    _, problems = validate(model, data)
    (only,) = problems
    return only.path, only.text, only.fix


def test_sections_of_a_field_that_holds_several() -> None:
    assert sections_of(Holder) == {"by_name": Entry, "in_list": Entry, "inner": Entry}


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"by_name": {"mine": {"dpeth": 2}}}, "by_name.mine.dpeth"),
        ({"by_name": {"depth": {"dpeth": 2}}}, "by_name.depth.dpeth"),
        ({"in_list": [{}, {"dpeth": 2}]}, "in_list[1].dpeth"),
        ({"inner": {"dpeth": 2}}, "inner.dpeth"),
    ],
)
def test_an_unknown_key_in_an_entry_gets_the_nearest(data: Any, path: str) -> None:
    assert problem(Holder, data) == (path, "unknown key (its value is 2)", 'did you mean "depth"?')


def test_entries_in_entries() -> None:
    found = problem(Outer, {"holders": {"a": {"by_name": {"b": {"dpeth": 2}}}}})
    assert found == ("holders.a.by_name.b.dpeth", "unknown key (its value is 2)", 'did you mean "depth"?')
    path, _, fix = problem(Outer, {"holders": {"a": {"in_lst": []}}})
    assert (path, fix) == ("holders.a.in_lst", 'did you mean "in_list"?')


@pytest.mark.parametrize("data", [{"by_name": {"mine": 3}}, {"by_name": {"depth": 3}}])
def test_an_entry_of_the_wrong_kind(data: Any) -> None:
    (name,) = data["by_name"]
    assert problem(Holder, data) == (f"by_name.{name}", "got 3, must be an object { ... }", None)


def test_a_value_in_an_entry() -> None:
    path, text, _ = problem(Holder, {"by_name": {"mine": {"depth": "deep"}}})
    assert path == "by_name.mine.depth"
    assert text.startswith('got "deep", ')
    assert problem(Holder, {"free": {"x": "y"}})[0] == "free.x"
