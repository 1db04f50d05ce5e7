"""Lines and columns of keys: against a writer that knows where it puts them, and against the parsers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import hjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_core.config.positions import Lines, Place, Scan, scan

if TYPE_CHECKING:
    from ds_core.config.paths import Path

COMMON = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def places_of(found: Scan) -> dict[Path, Place]:
    """Return every path that the scanner found -> its place."""
    places: dict[Path, Place] = {}

    def collect(place: Place, path: Path) -> None:
        for key, inner in place.inside.items():
            places[(*path, key)] = inner
            collect(inner, (*path, key))

    collect(found.root, ())
    return places


def all_places(text: str) -> dict[Path, int]:
    """Return every path that the scanner found -> its offset."""
    return {path: place.offset for path, place in places_of(scan(text)).items()}


def all_paths(value: Any, keys: Path = ()) -> set[Path]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {path for key, item in items for path in {(*keys, key), *all_paths(item, (*keys, key))}}


# Every sign that means something to a parser, and some that look like it to Python.
awkward = st.text(st.sampled_from(list("ab1 :,{}[]#/*'\"\\\n\r\t-é\u2028\x85\U0001f600truefalsn")), max_size=8)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.floats(), awkward, st.just(""), st.just("true")
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(awkward, inner, max_size=4), max_leaves=20
)
objects = st.dictionaries(awkward, values, max_size=5)


@COMMON
@given(
    value=objects,
    indent=st.sampled_from([None, 0, 1, 4, "\t"]),
    separators=st.sampled_from([None, (",", ":"), (" ,\n ", "\t:\r\n ")]),
    ensure_ascii=st.booleans(),
)
def test_json(value: dict[str, Any], indent: int | str | None, separators: Any, ensure_ascii: bool) -> None:
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=ensure_ascii)
    found = scan(text, is_plain_json=True, notes=True)
    places = places_of(found)
    assert places.keys() == all_paths(value)
    # NaN is not equal to itself, but is written as itself.
    assert json.dumps(json.loads(text[found.root.start : found.root.end])) == json.dumps(value)
    for path, place in places.items():
        assert json.dumps(json.loads(text[place.start : place.end])) == json.dumps(at(value, path))
        if isinstance(path[-1], str):
            assert json.loads(text[place.offset : place.key_end]) == path[-1]
        else:
            assert place.offset == place.key_end == place.start
    numbers = [at(value, path) for path in places if isinstance(at(value, path), float)]
    assert found.numbers == {number: json.dumps(number) for number in numbers if math.isfinite(number)}
    assert (found.is_whole, found.comments) == (True, [])


def at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


ANY = ("", ",", "\n")
ENDS_LINE = ("\n", "\r\n", "\r")
"""Behind a string without quotes."""
ENDS_NUMBER = (",", "\n", "\r", "# }\n", "// ]\n", "/**/")
"""Behind a number or a word: with anything else it begins a string without quotes."""


@dataclass
class Writer:
    """Writes HJSON with everything that it allows, and notes where keys and values are, and comments."""

    data: st.DataObject
    text: str = ""
    places: dict[Path, tuple[int, int, int, int]] = field(default_factory=dict)
    """Where the key and the value begin and end."""
    comments: list[tuple[int, int]] = field(default_factory=list)

    def choose(self, *options: Any) -> Any:
        return self.data.draw(st.sampled_from(options))

    def blank(self) -> None:
        """Write space and comments."""
        blanks = (" ", "\n", "\t", "\r\n", "# a: {\n", "// '''x\n", '/* b: [ " \n */', "/**/", "")
        self.write(self.choose(*blanks))
        self.write(self.choose(*blanks))

    def write(self, blank: str) -> None:
        if blank[:1] in ("#", "/"):
            self.comments.append((len(self.text), len(self.text) + len(blank.rstrip("\n"))))
        self.text += blank

    def key(self, key: str) -> int:
        """Write ``key``; return its end."""
        plain = (
            key
            and key == key.strip()
            and not set(key) & set(" \t\n\r:{}[],")
            and key[0] not in "\"'#"
            and key[:2] not in ("//", "/*")
        )
        forms = [json.dumps(key), json.dumps(key, ensure_ascii=False), single_quoted(key)]
        if plain:
            forms.append(key)
        form = self.choose(*forms)
        self.text += form
        end = len(self.text)
        if form == key:
            self.text += self.choose("", " ", "\n", " \t")
        else:
            self.blank()
        self.text += ":"
        return end

    def value(self, value: Any, path: Path) -> tuple[str, ...]:
        """Write ``value``; return what may follow it."""
        if isinstance(value, dict):
            self.text += "{"
            self.members(value, path)
            self.text += "}"
            return ANY
        if isinstance(value, list):
            self.text += "["
            self.blank()
            for index, item in enumerate(value):
                start = len(self.text)
                self.member(item, (*path, index), (start, start), is_last=index == len(value) - 1)
            self.text += "]"
            return ANY
        if isinstance(value, str):
            return self.string(value)
        self.text += json.dumps(value) + self.choose("", " ", "\t")
        return ENDS_NUMBER

    def members(self, value: dict[str, Any], path: Path) -> None:
        self.blank()
        for index, (key, item) in enumerate(value.items()):
            start = len(self.text)
            key_end = self.key(key)
            self.blank()
            self.member(item, (*path, key), (start, key_end), is_last=index == len(value) - 1)

    def member(self, value: Any, path: Path, key: tuple[int, int], *, is_last: bool) -> None:
        """Write a value of an object or a list and what comes behind it; ``key`` is where its key is."""
        start = len(self.text)
        ends = self.value(value, path)
        written = self.text[start:]
        self.places[path] = (*key, start, start + len(written.rstrip(" \t") if ends is ENDS_NUMBER else written))
        self.separator(ends, is_last=is_last)

    def separator(self, ends: tuple[str, ...], *, is_last: bool) -> None:
        """Write what may come behind a value: one of ``ends``."""
        # A closing bracket ends a number, too; not so a string without quotes.
        end = self.choose(*ends, *([""] if is_last and ends is ENDS_NUMBER else []))
        self.write(end)
        self.blank()
        if end != "," and self.choose(True, False):
            self.text += ","  # behind the last one, too
        self.blank()

    def string(self, value: str) -> tuple[str, ...]:
        forms: list[tuple[str, tuple[str, ...]]] = [(json.dumps(value), ANY), (single_quoted(value), ANY)]
        if "'" not in value:
            forms.append((f"'''{value}'''", ANY))
        is_bare = value and value == value.strip() and not set(value) & set("\n\r") and value[0] not in "{}[],:#/'\""
        if is_bare and not value.startswith(("true", "false", "null", "-", *"0123456789")):
            forms.append((value, ENDS_LINE))
        form: tuple[str, tuple[str, ...]] = self.choose(*forms)
        self.text += form[0]
        return form[1]


def single_quoted(value: str) -> str:
    return "'" + json.dumps(value)[1:-1].replace('\\"', '"').replace("'", "\\'") + "'"


finite = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.floats(allow_nan=False, allow_infinity=False) | awkward,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(awkward, inner, max_size=3),
    max_leaves=12,
)


@COMMON
@given(value=st.dictionaries(awkward, finite, max_size=4), data=st.data())
def test_hjson(value: dict[str, Any], data: st.DataObject) -> None:
    writer = Writer(data)
    if value and writer.choose(True, False):
        writer.members(value, ())  # the root needs no braces
    else:
        writer.blank()
        writer.value(value, ())
        writer.blank()
    text = writer.text
    parsed = json.loads(json.dumps(hjson.loads("\n" + text)))
    assert all_paths(parsed) == all_paths(value), "the writer of this test wrote something else"
    found = scan(text, notes=True)
    places = {path: (at.offset, at.key_end, at.start, at.end) for path, at in places_of(found).items()}
    assert places == writer.places
    assert found.comments == writer.comments
    assert found.is_whole
    assert found.numbers.keys() == {at(value, path) for path in places if isinstance(at(value, path), float)}
    assert all(float(written) == number for number, written in found.numbers.items())


@COMMON
@given(st.text(st.sampled_from(list("ab1:,{}[]#/*'\"\\\n -\u0661")), max_size=30))
def test_same_paths_as_hjson(text: str) -> None:
    try:
        parsed = hjson.loads("\n" + text)
    except (hjson.HjsonDecodeError, IndexError):
        scan(text)  # it only must not raise
        return
    if isinstance(parsed, (dict, list)):
        assert all_places(text).keys() == all_paths(parsed)


@COMMON
@given(st.text())
def test_any_text(text: str) -> None:
    lines = Lines(text)
    for offset in all_places(text).values():
        line, column = lines.position(offset)
        assert text.split("\n")[line - 1][column - 1 :] == text[offset:].split("\n")[0]


@pytest.mark.parametrize(
    ("text", "offset"),
    [
        ('{"a": 1, "a": 2}', 9),
        ('{"a": 1, "a": 2, "a": 3}', 9),  # the second of three
        ('{"a": 1, "\\u0061": 2}', 9),
        ("a: 1\n'a': 2", 5),
        ('{"b": {"a": 1, "a": 1}, "a": 2}', 24),
    ],
)
def test_keys_given_twice(text: str, offset: int) -> None:
    assert scan(text).find(("a",)) == offset


def test_inside_a_key_given_twice() -> None:
    found = scan('{"a": {"x": 1, "y": 2}, "a": {"y": 3, "z": {"y": 4}}}')
    assert found.find(("a", "y")) == 30  # the last counts, so its keys are the ones looked for
    assert found.find(("a", "x")) is None
    assert found.find(("a", "z", "y")) == 44


def test_what_is_not_there() -> None:
    found = scan('{"a": [1, {"b": 2}]}')
    assert found.find(("a", 1, "b")) == 11
    for keys in (("b",), ("a", 2), ("a", "1"), ("a", 0, "b"), (0,)):
        assert found.find(keys) is None


def test_up_to_a_syntax_error() -> None:
    assert all_places('{"a": 1, "b": {"c": 2, ]') == {("a",): 1, ("b",): 9, ("b", "c"): 15}


def test_pairs_of_escapes_are_one_character() -> None:
    assert all_places('{"\\ud83d\\ude00": 1}') == {("\U0001f600",): 1}


def test_keys_that_end_in_other_spaces() -> None:
    text = "{\x85: 1, a\x85 : 2}"
    assert hjson.loads(text) == {"\x85": 1, "a": 2}
    assert all_places(text) == {("\x85",): 1, ("a",): 7}


def test_escapes_that_only_hjson_takes() -> None:
    text = '{"\\u004\n": {"\\u  41": 1}}'
    assert hjson.loads(text) == {"\x04": {"A": 1}}
    assert all_places(text) == {("\x04",): 1, ("\x04", "A"): 12}
    assert all_places('{"a": 1, "\\u-041": 1}') == {("a",): 1}
    assert all_places('{"a": 1, "\\uzzzz": 1}') == {("a",): 1}
    assert all_places('{"a": 1, "\\u') == {("a",): 1}


def test_depth() -> None:
    text = '{"a": [[{"b": 1}]]}'
    assert scan(text, max_depth=4).too_deep is None
    assert scan(text, max_depth=3).too_deep == 8
    assert scan("[" * 10**5).too_deep is None
    assert scan('{"a":' * 10**5, max_depth=10).too_deep == 50


HJSON = """\
# first
{
  a: 5e8 // of a
  "b c": some text, with , and } and # inside
  /* c: 1 */ d: [1, /* two */ 2.50
    x y
  ], e: {f: null}
  g: '''
     of many
     '''
}
// last
"""


def test_what_a_text_is_made_of() -> None:
    found = scan(HJSON, notes=True)
    assert {key: HJSON[place.start : place.end] for key, place in found.root.inside.items()} == {
        "a": "5e8",
        "b c": "some text, with , and } and # inside",
        "d": "[1, /* two */ 2.50\n    x y\n  ]",
        "e": "{f: null}",
        "g": "'''\n     of many\n     '''",
    }
    assert [HJSON[place.offset : place.key_end] for place in found.root.inside.values()] == ["a", '"b c"', *"deg"]
    comments = ["# first", "// of a", "/* c: 1 */", "/* two */", "// last"]
    assert [HJSON[start:end] for start, end in found.comments] == comments
    assert found.numbers == {5e8: "5e8", 2.5: "2.50"}
    assert HJSON[found.root.start : found.root.end] == HJSON[8:-9]
    assert (scan(HJSON).comments, scan(HJSON).numbers) == ([], {})


@pytest.mark.parametrize("text", ["{a: 1 /* }", "{a: 1}}", "{", "{a: 1} b", "{a: ]}", "{a: '''b}", '{"a: 1}', "a: {"])
def test_what_is_not_whole(text: str) -> None:
    assert not scan(text).is_whole


@pytest.mark.parametrize("text", ["a: 1", "# c\na: 1\nb: {c: 2}\n# c", "{a: 1, a: 2} // c", "[1]"])
def test_what_is_whole(text: str) -> None:
    found = scan(text)
    assert found.is_whole
    assert all(0 <= place.start < place.end <= len(text) for place in [found.root, *places_of(found).values()])


def test_what_is_never_closed() -> None:
    assert scan('{"a": [1, {"b": 2}').unclosed == 6
    assert scan("{a: 1 /* b").unclosed == 6
    assert scan("{a: '''b").unclosed == 4
    assert scan("{a: 1} /* b").unclosed == 7
    assert scan("a: 1").unclosed is None


def test_strings_that_take_brackets() -> None:
    assert scan("{a: x, b: 1\n c: y}").swallowed == 16
    assert scan('{"a": "x}", "b": 1}').swallowed is None


@pytest.mark.parametrize("text", ["{a: 1}", "a: 1", "{'a': 1}", '{"a": 1 # b\n}', "{\"a\": '''b'''}", '{"a": /**/ 1}'])
def test_hjson_on_purpose(text: str) -> None:
    assert scan(text).is_hjson


@pytest.mark.parametrize("text", ['{"a": 1,}', '{"a": True}', '{"a": 1\n"b": 2}', '{"a": "# b"}', "{", ""])
def test_hjson_by_mistake(text: str) -> None:
    assert not scan(text).is_hjson


def test_lines() -> None:
    lines = Lines("ab\n\ncd")
    assert [lines.position(offset) for offset in range(7)] == [
        (1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (3, 2), (3, 3),
    ]  # fmt: skip
