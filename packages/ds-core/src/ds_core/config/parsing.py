"""From text to one object of plain values: JSON, or else HJSON; its limits, and what is said where it is neither."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ds_core.config.positions import Lines, Scan, scan
from ds_core.config.section import show
from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ds_core.config.paths import Path

__all__ = ["MAX_BYTES", "MAX_DEPTH", "Parsed", "parse", "too_deep", "too_large"]

MAX_BYTES = 2**20
"""Text of a configuration. The largest known has 30 KB; a path to something else is often much larger."""
MAX_DEPTH = 64
"""Objects inside objects; no configuration needs more, and unbounded depth would exhaust the stack."""
MAX_DIGITS = 400
"""Characters of a number. A double needs fewer, and Python refuses whole numbers of some thousands."""
MAX_EFFORT = 4 * 10**8
"""Steps that hjson may take beyond those in proportion to the text, see :func:`_effort`: about a second."""
TRAILING_COMMA = re.compile(r"[ \t\n\r]*[}\]]")
MAX_SHOWN = 76
"""Characters of a line of the text that an error shows."""


@dataclass(frozen=True)
class Parsed:
    """The object that a text is, and how it was written."""

    value: dict[str, Any]
    twice: tuple[Path, ...]
    """Keys given twice in one object; the value has the last."""
    is_plain_json: bool


def parse(text: str, where: str) -> Parsed:
    """Return the object that ``text`` holds.

    Args:
        text: JSON or HJSON.
        where: what errors call it.

    Raises:
        ConfigError: it is neither, or not one object, or beyond a limit. The error shows the line.
    """
    if "\0" in text:
        raise ConfigError(
            f"this is not text: it has a null byte{_spot(text, text.index(chr(0)))}",
            where=where,
            fix="save it as UTF-8",
        )
    if text.count("{") + text.count("[") > MAX_DEPTH:
        # Before parsing: json recurses in C, and who has raised Python's limit would run out of stack.
        walked = scan(text, is_plain_json=True, max_depth=MAX_DEPTH)
        if walked.too_deep is not None:
            raise too_deep(where, _spot(text, walked.too_deep))
    value, is_plain_json = _value(text, where)
    if not isinstance(value, _Object):
        if isinstance(value, dict):  # what hjson makes of nothing
            raise ConfigError(
                "the text is empty" if not text.strip() else "the text holds only comments",
                where=where,
                fix='write one object, such as {"train_micro_batch_size_per_gpu": 1}',
            )
        raise ConfigError(
            f"a configuration must be one object {{ ... }}, got {show(value)}", where=where, fix="put it in braces"
        )
    if "\\u" in text:
        _refuse_half_characters(text, value, where)
    return Parsed(value, tuple(_given_twice(value, ())), is_plain_json)


def too_deep(where: str, spot: str = "") -> ConfigError:
    """Return the error of a configuration with more than ``MAX_DEPTH`` levels."""
    return ConfigError(f"objects are nested more than {MAX_DEPTH} deep{spot}", where=where, fix="remove the nesting")


def too_large(what: str, where: str) -> ConfigError:
    """Return the error of a text with more than ``MAX_BYTES``; ``what`` says what has how many."""
    return ConfigError(
        f"{what}, a configuration may have {MAX_BYTES}",
        where=where,
        fix="check that this is the configuration, and not data or a checkpoint",
    )


class _Object(dict[str, Any]):
    """An object of a text, which remembers the keys it was given twice."""

    def __init__(self, items: list[tuple[str, Any]]) -> None:
        super().__init__(items)
        self.twice: tuple[str, ...] = ()
        if len(self) < len(items):
            self.twice = tuple(key for key, count in Counter(key for key, _ in items).items() if count > 1)


def _given_twice(value: Any, path: Path) -> Iterator[Path]:
    if isinstance(value, _Object):
        yield from ((*path, key) for key in value.twice)
    items: Iterable[tuple[str | int, Any]] = value.items() if isinstance(value, _Object) else enumerate(value)
    for place, item in items:
        if isinstance(item, (_Object, list)):
            yield from _given_twice(item, (*path, place))


class _BadNumber(Exception):  # noqa: N818 - told as a ConfigError
    """A number that Python cannot hold, or only as infinity."""

    def __init__(self, number: str, why: str) -> None:
        super().__init__(number, why)
        self.number, self.why = number, why


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _BadNumber(text, f"a number has {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    if len(text) > MAX_DIGITS:
        raise _BadNumber(text, f"a number has {len(text)} characters")
    value = float(text)
    if math.isinf(value):
        raise _BadNumber(text, f"{text} is larger than the largest number, 1.8e308")
    return value


HOOKS: dict[str, Any] = {"object_pairs_hook": _Object, "parse_int": _int, "parse_float": _float}


def _value(text: str, where: str) -> tuple[Any, bool]:
    """Return the value that ``text`` is, and whether it is JSON."""
    try:
        return json.loads(text, **HOOKS), True
    except RecursionError:
        raise too_deep(where) from None
    except (json.JSONDecodeError, _BadNumber) as error:
        of_json = error  # HJSON may still take it: a string without quotes can begin like a number
    if _effort(text) > MAX_EFFORT:
        raise _refusal(text, where, of_json, None)

    # Comments, keys without quotes, trailing commas. Only on demand: most files are JSON, which parses far faster.
    import hjson

    try:
        # The line break in front: hjson looks back for one from each ''', and past the beginning if there is none.
        return hjson.loads("\n" + text, **HOOKS), False
    except RecursionError:
        raise too_deep(where) from None
    except (ValueError, IndexError, _BadNumber) as error:
        of_hjson = error
    root = scan(text).root.offset
    if root < len(text) and text[root] not in "{[":
        # A root without braces that fails is tried again as a single value, and that error says nothing of the first.
        try:
            hjson.loads(f"{text[:root]}{{\n{text[root:]}\n}}", **HOOKS)
        except (ValueError, IndexError, _BadNumber) as error:
            of_hjson = error
            if isinstance(error, hjson.HjsonDecodeError):
                error.pos -= 1  # two characters went in, not one
    raise _refusal(text, where, of_json, of_hjson)


def _effort(text: str) -> int:
    """Return a bound of the steps in which hjson goes over one line again and again.

    It looks at a whole value without quotes at each sign that might end it, and goes back to the beginning of the line
    from each ''', one character at a time (which takes ten times as long). Lines of usual length cost nothing.
    """
    return sum(len(line) * (sum(map(line.count, ",}]#/")) + 10 * line.count("'''")) for line in text.split("\n"))


def _refusal(
    text: str, where: str, of_json: json.JSONDecodeError | _BadNumber, of_hjson: Exception | None
) -> ConfigError:
    """Return the more useful of two errors.

    Args:
        text: what cannot be parsed.
        where: what errors call it.
        of_json: json's error.
        of_hjson: hjson's error; None where hjson would have taken too long to find it.
    """
    for error in (of_hjson, of_json):
        if isinstance(error, _BadNumber):
            is_only = text.count(error.number) == 1
            spot = _spot(text, text.index(error.number)) if is_only else ""
            return ConfigError(f"{error.why}{spot}", where=where, fix="write a number that can be meant")
    assert isinstance(of_json, json.JSONDecodeError)
    found = scan(text)
    is_hjson = found.is_hjson or (hasattr(of_hjson, "pos") and _is_trailing_comma(text, of_json.pos))
    if not is_hjson:
        what, offset = _in_our_words(of_json.msg), of_json.pos
    elif of_hjson is None:
        longest = max(text.split("\n"), key=len)
        return ConfigError(
            f"a line of {len(longest)} characters is too long for HJSON{_spot(text, text.index(longest))}",
            where=where,
            fix="break the line, or write plain JSON",
        )
    elif isinstance(of_hjson, IndexError):  # what hjson does at the end of the text, in a comment or '''
        what, offset = "the text ends too early", len(text)
    elif hasattr(of_hjson, "pos"):
        what, offset = _in_our_words(getattr(of_hjson, "msg", "")), getattr(of_hjson, "pos", 1) - 1
    else:  # a ValueError of Python's: hjson lets a sign pass for a digit, and there is no character -1
        escape = re.search(r"\\u(?![0-9a-fA-F]{4})", text)
        what, offset = "invalid \\uXXXX escape", escape.start() if escape else 0
    if offset >= len(text.rstrip()) or text[offset] in "}]":
        what, offset = _at_a_bracket(what, offset, text, found)
    fix = "correct the syntax"
    for python, correct in (("True", "true"), ("False", "false"), ("None", "null")):
        if text.startswith(python, offset):
            fix = f"write {correct}"
    return ConfigError(f"this is neither JSON nor HJSON: {what}{_spot(text, offset)}", where=where, fix=fix)


def _at_a_bracket(what: str, offset: int, text: str, found: Scan) -> tuple[str, int]:
    """Return what is wrong, and where, if parsing failed at a closing bracket or the end: often far behind it."""
    opening = text[found.unclosed] if found.unclosed is not None else ""
    if opening in "{[" and found.is_hjson and found.swallowed is not None:
        return "a value without quotes takes the rest of its line, brackets too", found.swallowed
    if found.unclosed is None:
        return what, offset
    kind = {"/": "comment", "'": "string"}.get(opening, "bracket")
    return f"this {kind} is never closed", found.unclosed


def _is_trailing_comma(text: str, offset: int) -> bool:
    """Return whether json stopped because of a comma before a bracket, which HJSON allows: not the mistake, then."""
    # Since Python 3.13 it stops at the comma, before that at the bracket.
    if text.startswith(",", offset):
        return TRAILING_COMMA.match(text, offset + 1) is not None
    return TRAILING_COMMA.match(text, offset) is not None and text[:offset].rstrip().endswith(",")


def _in_our_words(message: str) -> str:
    # Versions of Python differ in whether the character follows.
    message = re.sub(r"(\\escape|control character)\b.*", r"\1", message)
    # Some end in "at" or "starting at", for the position that json and hjson add.
    return (message[:1].lower() + message[1:]).removesuffix(" at").removesuffix(" starting")


def _spot(text: str, offset: int) -> str:
    """Return line and column of ``offset``, and under them the line with a mark."""
    offset = min(offset, len(text))
    line, column = Lines(text).position(offset)
    begin = text.rfind("\n", 0, offset) + 1
    end = text.find("\n", offset)
    whole = text[begin : len(text) if end < 0 else end]
    start = max(0, min(column - 1 - MAX_SHOWN // 2, len(whole) - MAX_SHOWN))
    shown = "".join(letter if letter.isprintable() else " " for letter in whole[start : start + MAX_SHOWN])
    mark = " " * (column - 1 - start) + "^"
    return f" (line {line}, column {column})\n    {shown.rstrip()}\n    {mark}"


def _refuse_half_characters(text: str, value: Any, where: str) -> None:
    # They come only from escapes, and no terminal, file or log can take them: each later message would fail.
    if isinstance(value, str):
        half = next((letter for letter in value if "\ud800" <= letter <= "\udfff"), None)
        if half is not None:
            escape = f"\\u{ord(half):04x}"
            found = [match.start() for match in re.finditer(re.escape(escape), text, re.IGNORECASE)]
            raise ConfigError(
                # Elsewhere the same half may have its other half.
                f"{escape} is half of a character{_spot(text, found[0]) if len(found) == 1 else ''}",
                where=where,
                fix="write the character itself, or both halves",
            )
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_half_characters(text, key, where)
            _refuse_half_characters(text, item, where)
    elif isinstance(value, list):
        for item in value:
            _refuse_half_characters(text, item, where)
