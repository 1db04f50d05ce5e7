"""Sub-sections of plugins: which names are taken for slips of the pen."""

from __future__ import annotations

import pytest

from ds_core import registry
from ds_core.config import find_problems


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"checkpoint": ("plain", "streams"), "precision": ("fp32",), "partition": ("replicated",)}
    monkeypatch.setattr(registry, "names", lambda seam: installed.get(seam, ()))


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("shraded", "sharded"),  # a package of ours brings it, installed or not
        ("plane", "plain"),
        ("stream", "streams"),
        ("tag_validate", "tag_validation"),
        ("enginne", "engine"),
    ],
)
def test_near_miss(name: str, suggested: str) -> None:
    (problem,) = find_problems({"checkpoint": {name: {}}})
    assert (problem.path, problem.fix) == (f"checkpoint.{name}", f'did you mean "{suggested}"?')


@pytest.mark.parametrize("name", ["sharded", "streams", "plain", "async", "mine", "tapes"])
def test_names_of_plugins_here_or_elsewhere(name: str) -> None:
    assert find_problems({"checkpoint": {name: {"any": "thing"}}}) == []


def test_the_chosen_name_may_look_like_another() -> None:
    assert find_problems({"checkpoint": {"engine": "plain2", "plain2": {}}}) == []
    (problem,) = find_problems({"checkpoint": {"engine": "stripes", "stripe": {}}})
    assert problem.fix == 'did you mean "stripes"?'


def test_short_names_differ_by_one_letter_on_purpose() -> None:
    assert find_problems({"precision": {"fp8": {}, "fp6": {}}}) == []


@pytest.mark.parametrize("section", ["checkpoint", "precision", "partition"])
@pytest.mark.parametrize("value", [3, True, "text", [1], None])
def test_a_sub_section_is_an_object(section: str, value: object) -> None:
    (problem,) = find_problems({section: {"mine": value}})
    assert problem.text.startswith("unknown key")


@pytest.mark.parametrize("section", ["precision", "partition"])
def test_type_is_the_chosen_name(section: str) -> None:
    assert find_problems({section: {"type": "mine", "mine": {"rows": 2}}}) == []
    assert [problem.path for problem in find_problems({section: {"type": 3}})] == [f"{section}.type"]
