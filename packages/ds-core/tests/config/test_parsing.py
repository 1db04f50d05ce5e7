"""What is said about text that is no configuration: the mistake, its line and column, and the line itself."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from ds_core.config.parsing import parse
from ds_core.errors import ConfigError

SWALLOWED = "a value without quotes takes the rest of its line, brackets too"


@pytest.mark.parametrize(
    ("message", "offset"),
    [
        ("Expecting value", 9),
        ("Illegal trailing comma before end of array", 8),  # since Python 3.13
    ],
)
def test_trailing_commas_in_any_python(monkeypatch: pytest.MonkeyPatch, message: str, offset: int) -> None:
    text = '{"a": [1,], "b" 2}'

    def loads(*_: Any, **__: Any) -> None:
        raise json.JSONDecodeError(message, text, offset)

    monkeypatch.setattr("ds_core.config.parsing.json.loads", loads)
    assert error_of(text).what.startswith("this is neither JSON nor HJSON: expecting ':' delimiter (line 1, column 17)")


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ("Invalid \\escape", "invalid \\escape"),
        ("Invalid \\escape: ", "invalid \\escape"),
        ("Invalid \\escape: 'x'", "invalid \\escape"),
        ("Invalid control character at", "invalid control character"),
        ("Invalid control character '\\n' at", "invalid control character"),
        ("Unterminated string starting at", "unterminated string"),
    ],
)
def test_the_words_are_the_same_in_any_python(monkeypatch: pytest.MonkeyPatch, message: str, what: str) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise json.JSONDecodeError(message, '{"a" "b"}', 5)

    monkeypatch.setattr("ds_core.config.parsing.json.loads", loads)
    assert error_of('{"a" "b"}').what.startswith(f"this is neither JSON nor HJSON: {what} (line 1, column 6)")


def error_of(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text, "ds.json")
    return caught.value


def test_message_whole() -> None:
    assert str(error_of('{\n\t"a": 1\n\t"b" 2\n}')) == (
        "this is neither JSON nor HJSON: expecting ',' delimiter (line 3, column 2)\n"
        '     "b" 2\n'
        "     ^\n"
        "  where: ds.json\n"
        "  fix: correct the syntax"
    )


@pytest.mark.parametrize(
    ("text", "what", "place"),
    [
        # JSON with a mistake: json knows best.
        ('{"a": 1 "b": 2}', "expecting ',' delimiter", (1, 9)),
        ('{"a" 1}', "expecting ':' delimiter", (1, 6)),
        ('{"a": 1,, "b": 2}', "expecting property name enclosed in double quotes", (1, 9)),
        ('{"a": 1}}', "extra data", (1, 9)),
        ('{"a": "x\n"}', "invalid control character", (1, 9)),
        ('{"a": 1, "b: 2}', "unterminated string", (1, 10)),
        ('{"a": [1, 2\n  "b": 3\n}', "expecting ',' delimiter", (2, 3)),
        ('{"a": "\\x"}', "invalid \\escape", (1, 8)),
        # Commas before a bracket are no mistake in HJSON.
        ('{"a": [1,], "b" 2}', "expecting ':' delimiter", (1, 17)),
        ('{"a": {"c": 1, },\n"b" 2}', "expecting ':' delimiter", (2, 5)),
        ('{"a": 1,}}', "extra data", (1, 10)),
        # HJSON with a mistake: hjson knows best.
        ("{\n  // c\n  a b: 1\n}", "found whitespace in your key name (use quotes to include)", (3, 4)),
        ('{\n  # c\n  "a" 1\n}', "expecting ':' delimiter", (3, 7)),
        ("{a: 1}, b", "extra data", (1, 7)),
        ('{a: 1, b: "\\u-041"}', "invalid \\uXXXX escape", (1, 12)),
        ("a: 1\nb c: 2\n", "found whitespace in your key name (use quotes to include)", (2, 2)),
        (
            "# c\na: [\n  ,\n]",
            "found a punctuator character when expecting a quoteless string (check your syntax)",
            (3, 3),
        ),
        ("{a: ]}", "found a punctuator character when expecting a quoteless string (check your syntax)", (1, 5)),
        # The end of the text is where the parser noticed, not where the mistake is.
        ('{"a": 1,\n "b": {"c": 2\n}', "this bracket is never closed", (1, 1)),
        ('{"a": {\n "b": [1, 2', "this bracket is never closed", (2, 7)),
        ("# c\n{a: {\n}\n", "this bracket is never closed", (2, 1)),
        ('{"a": 1 /* b }', "this comment is never closed", (1, 9)),
        ("a: 1\nb: '''x", "this string is never closed", (2, 4)),
        ("# c\n{a: b}", SWALLOWED, (2, 5)),
        ("{\n a: [x]\n}", SWALLOWED, (2, 6)),
        ('{"a": [1', "this bracket is never closed", (1, 7)),
        ("{", "this bracket is never closed", (1, 1)),
    ],
)
def test_syntax(text: str, what: str, place: tuple[int, int]) -> None:
    error = error_of(text)
    first, line, mark = error.what.split("\n")
    said, _, spot = first.removeprefix("this is neither JSON nor HJSON: ").rpartition(" (line ")
    assert said == what
    assert spot == f"{place[0]}, column {place[1]})"
    # The mark is under the place.
    assert (line + " ")[len(mark) - 1] == (text.split("\n")[place[0] - 1] + " ")[place[1] - 1]
    assert (error.where, error.fix) == ("ds.json", "correct the syntax")


@pytest.mark.parametrize(("word", "fix"), [("True", "true"), ("False", "false"), ("None", "null")])
def test_words_of_python(word: str, fix: str) -> None:
    error = error_of('{"fp16": {"enabled": ' + word + "}}")
    assert "(line 1, column 22)" in error.what
    assert error.fix == f"write {fix}"


def test_long_lines_are_cut_around_the_mistake() -> None:
    first, line, mark = error_of('{"a": "' + "x" * 499 + '", "b" "y": "' + "z" * 500 + '"}').what.split("\n")
    assert "(line 1, column 514)" in first
    assert len(line) == 80
    assert line[len(mark) - 1 :].startswith('"y": "z')


def test_lines_with_control_characters_are_safe_to_print() -> None:
    assert error_of('{"a": "\x1b[31m"}').what.split("\n")[1] == '    {"a": " [31m"}'


@pytest.mark.parametrize(
    ("number", "what"),
    [
        ("1" * 401, "a number has 401 digits"),
        ("-0." + "1" * 400, "a number has 403 characters"),
        ("1e999", "1e999 is larger than the largest number, 1.8e308"),
        ("-1e999", "-1e999 is larger than the largest number, 1.8e308"),
    ],
)
@pytest.mark.parametrize("comment", ["", "# c\n"])
def test_numbers(number: str, what: str, comment: str) -> None:
    line = 2 if comment else 1
    error = error_of(f'{comment}{{"a": [{number}]}}')
    assert error.what.startswith(f"{what} (line {line}, column 8)\n")
    assert parse(f'{{"a": "{number}"}}', "ds.json").value == {"a": number}


def test_digits_are_refused_before_python_refuses_them() -> None:
    assert sys.int_info.str_digits_check_threshold > 401


def test_a_string_without_quotes_may_begin_like_a_number() -> None:
    assert parse("{a: 1e999 is large\n b: " + "1" * 500 + "x\n}", "").value == {
        "a": "1e999 is large",
        "b": "1" * 500 + "x",
    }


@pytest.mark.parametrize("half", ["\\ud83d", "\\uDE00"])
def test_halves_of_characters(half: str) -> None:
    error = error_of('{"a": ["\\ud83d\\ude00", {"' + half + '": 1}]}')
    assert error.what == f"{half.lower()} is half of a character"  # where it stands is not sure
    assert "(line 1, column 8)" in error_of('{"a": "' + half + '"}').what
    assert parse('{"a": "\\ud83d\\ude00"}', "").value == {"a": "\U0001f600"}


def test_multi_line_string_in_the_first_line() -> None:
    assert parse("{a: '''b'''}", "").value == {"a": "b"}
    assert parse("a:\n  '''\n  b\n    c\n  '''", "").value == {"a": "b\n  c"}


def test_lines_too_long_for_hjson() -> None:
    # A comment behind it makes it HJSON, and hjson looks at each number again at each comma.
    line = "a: " + "1" * 50_000 + "x" + "," * 50_000
    error = error_of("# c\n" + line)
    assert error.what.startswith("a line of 100004 characters is too long for HJSON (line 2, column 1)\n")
    assert error.fix == "break the line, or write plain JSON"
    # JSON with a mistake is JSON.
    assert "expecting ',' delimiter" in error_of('{"a": [' + "1," * 50_000 + "2 3]}").what
