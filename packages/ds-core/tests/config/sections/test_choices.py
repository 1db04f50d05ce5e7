"""Sections that choose a plugin: which names are taken for slips of the pen, and the writer of a checkpoint."""

from __future__ import annotations

import pytest

from ds_core import registry
from ds_core.config import CheckpointSection, Section, find_problems
from ds_core.config.sections.choices import WriterSection
from ds_core.testing.config import SectionContract


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


@pytest.mark.parametrize(
    ("section", "key", "name", "meant"),
    [
        ("checkpoint", "engine", "shraded", "sharded"),
        ("checkpoint", "engine", "Plain", "plain"),
        ("checkpoint", "engine", "asnyc", "async"),
        ("precision", "type", "torch_autocst", "torch_autocast"),
        ("partition", "type", "replicate", "replicated"),
    ],
)
def test_a_slip_of_the_chosen_name(section: str, key: str, name: str, meant: str) -> None:
    (problem,) = find_problems({section: {key: name}})
    assert problem.path == f"{section}.{key}"
    assert problem.text == f'got "{name}", and no plugin is called so'
    assert problem.fix == f'did you mean "{meant}"?'


@pytest.mark.parametrize("name", ["plain", "sharded", "async", "streams", "mine", "fp8"])
def test_a_chosen_name_that_is_here_or_may_be_elsewhere(name: str) -> None:
    assert find_problems({"checkpoint": {"engine": name}}) == []


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


WRITER = {
    "type": "FAST",
    "io_buffer_size": 67108864,
    "io_buffer_double": True,
    "show_statistics": False,
    "data_parallel": None,
    "decoupled": False,
    "io_multiplier": 1,
}


class TestWriterSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return WriterSection


def test_defaults_of_a_writer() -> None:
    assert WriterSection().model_dump(by_alias=True) == WRITER
    assert not WriterSection().is_on()
    assert WriterSection.model_validate({"type": "FAST"}).is_on()


@pytest.mark.parametrize(
    ("name", "allowed"), [("type", ["FAST", "PYTHON", "MOCK"]), ("data_parallel", ["REPLICA", "SOCKET", "MACHINE"])]
)
def test_words_of_a_writer_in_any_case(name: str, allowed: list[str]) -> None:
    for word in filter("MOCK".__ne__, allowed):
        for written in (word, word.lower(), word.capitalize()):
            assert getattr(WriterSection.model_validate({name: written}), name) == word


@pytest.mark.parametrize("writer", [None, {}, "auto", {"type": "auto"}])
def test_no_writer(writer: object) -> None:
    assert find_problems({"checkpoint": {"writer": writer}}) == []
    assert CheckpointSection.model_validate({"writer": writer}).writer is None


@pytest.mark.parametrize("word", ["FAST", "fast", "Python"])
def test_a_writer_may_be_asked_for(word: str) -> None:
    assert find_problems({"checkpoint": {"writer": {"type": word}}}) == []
    section = CheckpointSection.model_validate({"writer": {"type": word}})
    assert (section.chosen, section.chosen_by) == (None, None)


@pytest.mark.parametrize("word", ["MOCK", "mock"])
def test_a_writer_that_writes_nothing_is_refused(word: str) -> None:
    (problem,) = find_problems({"checkpoint": {"writer": {"type": word}}})
    assert (problem.path, problem.fix) == ("checkpoint.writer.type", 'remove it, or write "FAST"')
    assert "nothing would be saved" in problem.text


def test_a_decoupled_writer_is_the_engine_async() -> None:
    section = CheckpointSection.model_validate({"writer": {"decoupled": True}})
    assert (section.chosen, section.chosen_by) == ("async", "checkpoint.writer.decoupled")
    assert section.engine is None
    given = CheckpointSection.model_validate({"writer": {"decoupled": True}, "engine": "plain"})
    assert (given.chosen, given.chosen_by) == ("plain", "checkpoint.engine")


@pytest.mark.parametrize(
    ("given", "path", "text"),
    [
        ({"type": "faster"}, "type", 'got "faster", allowed are "FAST", "PYTHON" or "MOCK"'),
        ({"io_buffer_size": 0}, "io_buffer_size", "got 0, must be at least 1"),
        ({"io_multiplier": 0}, "io_multiplier", "got 0, must be at least 1"),
        ({"data_parallel": "ALL"}, "data_parallel", 'got "ALL", allowed are "REPLICA", "SOCKET" or "MACHINE"'),
        ({"buffer": 1}, "buffer", "unknown key (its value is 1)"),
    ],
)
def test_what_a_writer_refuses(given: dict[str, object], path: str, text: str) -> None:
    problem = find_problems({"checkpoint": {"writer": given}})[0]
    assert (problem.path, problem.text) == (f"checkpoint.writer.{path}", text)
