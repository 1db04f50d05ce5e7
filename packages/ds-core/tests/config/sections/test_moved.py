"""Deprecated keys that moved into a sub-section."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import pytest

from ds_core.config import PositiveInt, Section, key
from ds_core.config.problems import validate
from ds_core.config.sections.moved import Moved, move, moved

if TYPE_CHECKING:
    from collections.abc import Mapping


class Inner(Section):
    """Where the keys are today."""

    size: PositiveInt = key("size", "length", default=1)
    """A number."""
    group: Any = None
    """An object."""


class Sample(Section):
    """A section with old keys."""

    inner: Inner = key("inner", "in", default=Inner())
    """Where the keys are today."""
    old_size: Annotated[PositiveInt, Moved("inner", "size")] = key("old_size", "older_size", default=1)
    """Deprecated."""
    old_group: Annotated[Any, Moved("inner", "group")] = None
    """Deprecated."""

    @classmethod
    def prepare(cls, data: Mapping[Any, Any]) -> dict[Any, Any]:
        return move(cls, super().prepare(data))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"old_size": 4}, {"inner": {"size": 4}}),
        ({"older_size": 4}, {"inner": {"size": 4}}),
        ({"old_size": 4, "in": {"group": "g"}}, {"inner": {"size": 4, "group": "g"}}),
        ({"old_size": 4, "inner": {"length": 4}}, {"inner": {"size": 4}}),
        ({"old_size": 4, "inner": {"size": "auto"}}, {"inner": {"size": 4}}),
        ({"old_size": "auto", "inner": {"size": 4}}, {"inner": {"size": 4}}),
        ({"old_group": "g", "old_size": 4}, {"inner": {"size": 4, "group": "g"}}),
        ({"old_group": None, "inner": {"group": "g"}}, {"inner": {"group": "g"}}),
        ({"old_size": 4, "inner": Inner(group="g")}, {"inner": {"size": 4, "group": "g"}}),
        ({"inner": {"size": 4}}, {"inner": {"size": 4}}),
    ],
)
def test_old_keys_are_read_as_new_ones(old: dict[str, Any], new: dict[str, Any]) -> None:
    before = dict(old)
    section = Sample.model_validate(old)
    assert section.model_dump(exclude_unset=True) == new
    assert (section.old_size, section.old_group) == (1, None)
    assert old == before


@pytest.mark.parametrize("holder", ["inner", "in"])
@pytest.mark.parametrize("size", ["size", "length"])
def test_a_contradiction_is_told_where_the_old_key_is(holder: str, size: str) -> None:
    section, problems = validate(Sample, {"old_size": 4, holder: {size: 2, "grp": 1}}, path=("top",))
    assert section is None
    assert {problem.path: problem.text for problem in problems} == {
        "top.old_size": f'got 4, but its replacement, "{holder}.{size}", is 2',
        f"top.{holder}.grp": "unknown key (its value is 1)",
    }


def test_the_default_contradicts_too_where_it_is_given() -> None:
    _, (problem,) = validate(Sample, {"old_size": 1, "inner": {"size": 2}})
    assert problem.path == "old_size"


def test_what_is_no_section_is_the_only_problem() -> None:
    _, (problem,) = validate(Sample, {"old_size": 4, "inner": 3})
    assert (problem.path, problem.text) == ("inner", "got 3, must be an object { ... }")


def test_values_are_checked_where_they_go() -> None:
    _, (problem,) = validate(Sample, {"old_size": 0})
    assert problem.text == "got 0, must be at least 1"


def test_what_moved_is_told() -> None:
    given = {"older_size": 4, "in": {"group": "g"}, "old_group": "other"}
    result, moves = moved(Sample, given)
    assert result == {"in": {"group": "g", "size": 4}, "old_group": "other"}
    assert moves == {"older_size": ("in", "size")}
    assert given == {"older_size": 4, "in": {"group": "g"}, "old_group": "other"}
    assert moved(Sample, {"old_size": "auto", "zork": 1, 3: 4}) == ({"old_size": "auto", "zork": 1, 3: 4}, {})
