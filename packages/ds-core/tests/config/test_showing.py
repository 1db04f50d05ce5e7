"""How messages show values: as JSON, short, printable, without secrets."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest

from ds_core.config.paths import dotted
from ds_core.config.showing import is_secret, printable, show, without_secrets


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


# C1 controls (a terminal takes U+009B for the start of a command), DEL, marks that turn or hide text, surrogates.
INVISIBLE = ["\x1b", "\x7f", "\x9b", "\u200b", "\u202e", "\u2066", "\u2028", "\ufeff", "\ud800", "\U000e0041", "\xa0"]


@pytest.mark.parametrize("letter", INVISIBLE, ids=ascii)
def test_what_a_terminal_obeys_or_nobody_sees_is_escaped(letter: str) -> None:
    for text in (printable(f"a{letter}b"), show(f"a{letter}b"), show({letter: [letter]}), dotted(("a", f"b{letter}"))):
        assert text.isprintable()
        assert letter not in text
        assert "\\u" in text
    assert printable(letter) == show(letter)[1:-1]


def test_objects_of_strangers_are_printable_too() -> None:
    class Loud:
        def __repr__(self) -> str:
            return "<\x1b[31m>"

    assert show(Loud()) == "<\\u001b[31m>"


@pytest.mark.parametrize(
    "text", ["größe", "学習率", "скорость", "מהירות", "क्षमता", "e\u0301", "😀", "a b", "\\", "x" * 9]
)
def test_letters_of_all_scripts_stay(text: str) -> None:
    assert printable(text) == text
    assert show(text) == ('"\\\\"' if text == "\\" else f'"{text}"')


def test_a_cut_comes_after_the_escapes() -> None:
    assert len(show("\x9b" * 1000)) == 60
    assert len(show("x" * 59)) == 60
    assert show("x" * 58) == f'"{"x" * 58}"'


@pytest.mark.parametrize(
    "name",
    ["api_key", "apikey", "API-Key", "api_keey", "password", "client_secret", "access_token", "token", "privateKey"],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)
    assert show({"comet": {name: "1f2e"}}) == f'{{"comet": {{"{name}": "..."}}}}'
    given = {"comet": {name: "1f2e", "online": True}, "list": [{name: ["1f2e"]}, 3], "none": {name: None}}
    shown = without_secrets(given)
    assert shown == {"comet": {name: "...", "online": True}, "list": [{name: "..."}, 3], "none": {name: None}}
    assert given["comet"][name] == "1f2e"  # type: ignore[call-overload] # it is a dict


@pytest.mark.parametrize(
    "name", ["max_tokens", "experiment_key", "steps_per_print", "tokenizer", "", 3, None, "capital"]
)
def test_names_of_no_secrets(name: object) -> None:
    assert not is_secret(name)
    assert "1f2e" in show({name: "1f2e"})
