"""Where the keys and values of a JSON or HJSON text stand: a scanner that knows where they end, not what they mean.

json and hjson parse, and keep no positions. This walks the text once, without recursion and in time linear in its
length. It follows hjson's grammar; where it loses its way it stops, and what comes after has no place.
"""

from __future__ import annotations

import bisect
import contextlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_core.config.paths import Path

__all__ = ["Lines", "Place", "Scan", "scan"]

BLANK = re.compile(r"[ \t\n\r]+|#[^\r\n]*|//[^\r\n]*")
STRING_STOP = re.compile(r"[\"'\\\x00-\x1f]")
# Ends at the colon. Spaces may come before it, but not inside the key.
BARE_KEY = re.compile(r"[^ \t\n\r:{}\[\],]+(?=[ \t\n\r]*:)")
_ENDS_VALUE = r"(?=[,}\]#\r\n]|/[/*]|\Z)"
# hjson's own definition of a number. What is neither of these is a string up to the end of the line.
LITERAL = re.compile(
    r"(?:(?:true|false|null)[^\S\r\n]*|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?[ \t]*)" + _ENDS_VALUE
)
JSON_CONSTANT = re.compile(r"(?:NaN|-?Infinity)[ \t]*" + _ENDS_VALUE)
REST_OF_LINE = re.compile(r"[^\r\n]*")
ESCAPE = re.compile(r"\\(?:u(.{4})|(.))", re.DOTALL)
ESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


@dataclass(slots=True)
class Place:
    """Where one key and its value stand, and what is inside the value. The root and what is in a list have no key."""

    offset: int
    """Where it begins: the key with its quotes, else the value."""
    key_end: int
    """Behind the key and its quotes; ``offset`` without a key."""
    start: int
    """Where the value begins."""
    end: int = -1
    """Behind the value; -1 where the walk did not come so far."""
    times: int = 1
    """How often its object has the key."""
    inside: dict[str | int, Place] = field(default_factory=dict)


@dataclass
class Scan:
    """What one walk through a text found."""

    root: Place
    """The whole text; its ``inside`` holds the top-level keys."""
    too_deep: int | None = None
    """Offset of the first bracket beyond the depth asked for; the walk ended there."""
    unclosed: int | None = None
    """Offset of what is open at the end of the text: a comment, a string in ''', or else the innermost bracket."""
    swallowed: int | None = None
    """Offset of the first string without quotes that holds a closing bracket, which is text then."""
    is_hjson: bool = False
    """Whether something was seen that nobody writes by mistake: a comment, a key without quotes, single quotes."""
    is_whole: bool = False
    """Whether the walk came to the end of a text in which nothing is left open."""
    comments: list[tuple[int, int]] = field(default_factory=list)
    """From where to where each comment reaches, if asked for."""
    numbers: dict[float, str] = field(default_factory=dict)
    """Each number with a point or an exponent -> how it is written, if asked for."""

    def find(self, path: Path) -> int | None:
        """Return the offset of the key (of the value, for an index) that ``path`` leads to, or None.

        For a key given twice it is the second one. Keys below it are those of the last, which is the one that counts.
        """
        place = self.root
        for key in path:
            found = place.inside.get(key)
            if found is None:
                return None
            place = found
        return place.offset


class Lines:
    """Line and column for offsets of one text.

    >>> Lines("{\\n  a: 1\\n}").position(4)
    (2, 3)
    """

    def __init__(self, text: str) -> None:
        self._starts = [0, *(found.end() for found in re.finditer("\n", text))]

    def position(self, offset: int) -> tuple[int, int]:
        """Return the line and the column of ``offset``, both from 1."""
        line = bisect.bisect_right(self._starts, offset)
        return line, offset - self._starts[line - 1] + 1


def scan(text: str, *, is_plain_json: bool = False, max_depth: int | None = None, notes: bool = False) -> Scan:
    """Return what a walk through ``text`` found, as far as it came.

    Args:
        text: JSON or HJSON.
        is_plain_json: JSON, where ``NaN`` and ``Infinity`` are numbers as Python writes them. In HJSON they begin a
            string without quotes.
        max_depth: objects and lists inside one another; the walk ends where there are more.
        notes: keep ``comments`` and ``numbers`` too.

    >>> scan("{a: {b: 1}}").find(("a", "b"))
    5
    >>> found = scan('{"a": 5e8} # often', notes=True)
    >>> found.root.inside["a"], found.comments, found.numbers
    (Place(offset=1, key_end=4, start=6, end=9, times=1, inside={}), [(11, 18)], {500000000.0: '5e8'})
    """
    scanner = _Scanner(text, is_plain_json, max_depth, notes)
    with contextlib.suppress(_Lost):  # a syntax error, which is the parser's to tell; what was found so far is right
        scanner.walk()
    return scanner.result


class _Lost(Exception):  # noqa: N818 - how a walk ends, not an error that anybody sees
    """The text does not go on as HJSON does."""


@dataclass(slots=True)
class _Open:
    """An object or list that is not closed yet."""

    place: Place
    closing: str
    """``}`` or ``]``, or nothing for a root object without braces."""


class _Scanner:
    def __init__(self, text: str, is_plain_json: bool, max_depth: int | None, notes: bool) -> None:
        self.text = text
        self.is_plain_json = is_plain_json
        self.notes = notes
        self.max_depth = len(text) if max_depth is None else max_depth
        self.open: list[_Open] = []
        self.result = Scan(Place(0, 0, 0))

    def walk(self) -> None:
        text, result = self.text, self.result
        at = self.skip(0)
        result.root = Place(at, at, at)
        if at == len(text):
            return
        if text[at] in "{[":
            at = self.value(result.root, at)
        else:
            self.open.append(_Open(result.root, ""))
        while self.open:
            inner = self.open[-1]
            at = self.skip(at)
            if at == len(text) and inner.closing:
                result.unclosed = inner.place.start
                return
            if at == len(text) or text[at] == inner.closing:
                self.open.pop()
                inner.place.end = at + len(inner.closing)
                at = self.comma(inner.place.end)
                continue
            if inner.closing == "]":
                place = Place(at, at, at)
                inner.place.inside[len(inner.place.inside)] = place
            else:
                place, at = self.key(inner, at)
            at = self.value(place, self.skip(at))
        result.is_whole = self.skip(at) == len(text)

    def skip(self, at: int) -> int:
        """Return where the next thing that is neither space nor comment begins."""
        text = self.text
        while True:
            found = BLANK.match(text, at)
            if not found and not text.startswith("/*", at):
                return at
            is_comment = text[at] in "#/"
            self.result.is_hjson |= is_comment
            end = found.end() if found else text.find("*/", at + 2) + 2
            if not found and end < 2:  # there is no */
                self.result.unclosed = at
                raise _Lost
            if is_comment and self.notes:
                self.result.comments.append((at, end))
            at = end

    def comma(self, at: int) -> int:
        if not self.open:  # behind the root
            return at
        at = self.skip(at)
        return at + 1 if self.text.startswith(",", at) else at

    def key(self, inner: _Open, at: int) -> tuple[Place, int]:
        """Note the key at ``at``; return its place and where its value may begin, behind the colon."""
        start = at
        if self.text[at] in "\"'":
            self.result.is_hjson |= self.text[at] == "'"
            key_end = self.string(at)
            name = _unescaped(self.text[start + 1 : key_end - 1])
            at = self.skip(key_end)
        else:
            found = BARE_KEY.match(self.text, at)
            if found is None:
                raise _Lost
            self.result.is_hjson = True
            at = self.skip_spaces(found.end())
            # hjson strips every kind of space here, if there is one before the colon that ends a key.
            name = found.group() if at == found.end() else found.group().rstrip()
            key_end = start + len(name)
        if not self.text.startswith(":", at):
            raise _Lost
        place = Place(start, key_end, key_end)
        earlier = inner.place.inside.get(name)
        if earlier is not None:
            place.times = earlier.times + 1
            if earlier.times > 1:
                place.offset, place.key_end = earlier.offset, earlier.key_end  # the second of many
        inner.place.inside[name] = place
        return place, at + 1

    def skip_spaces(self, at: int) -> int:
        # Behind a bare key, "#" would belong to the key: only spaces are between it and the colon.
        while self.text[at] in " \t\n\r":
            at += 1
        return at

    def value(self, place: Place, at: int) -> int:
        """Return where to go on behind the value at ``at``; inside it, for an object or a list."""
        text = self.text
        place.start = at
        first = text[at : at + 1]
        if first in ("{", "["):
            if len(self.open) >= self.max_depth:
                self.result.too_deep = at
                raise _Lost
            self.open.append(_Open(place, "}" if first == "{" else "]"))
            return at + 1
        if first in ('"', "'"):
            self.result.is_hjson |= first == "'"
            place.end = self.long_string(at) if text.startswith("'''", at) else self.string(at)
            return self.comma(place.end)
        if first in ("", "}", "]", ",", ":"):
            raise _Lost
        literal = LITERAL.match(text, at) or (JSON_CONSTANT.match(text, at) if self.is_plain_json else None)
        found = literal or REST_OF_LINE.match(text, at)
        assert found is not None  # the last one matches nothing, too
        written = found.group().rstrip()
        place.end = at + len(written)
        if literal is None and self.result.swallowed is None and ("}" in written or "]" in written):
            self.result.swallowed = at
        if literal and self.notes and written[-1].isdigit() and any(sign in written for sign in ".eE"):
            self.result.numbers[float(written)] = written
        return self.comma(found.end())

    def long_string(self, at: int) -> int:
        """Return the end of the string in three quotes that begins at ``at``."""
        end = self.text.find("'''", at + 3) + 3
        if end < 3:
            self.result.unclosed = at
            raise _Lost
        return end

    def string(self, at: int) -> int:
        """Return the end of the quoted string that begins at ``at``."""
        quote = self.text[at]
        at += 1
        while True:
            found = STRING_STOP.search(self.text, at)
            if found is None:
                raise _Lost
            stop, at = found.group(), found.end()
            if stop == quote:
                return at
            if stop == "\\":
                at += 5 if self.text.startswith("u", at) else 1  # hjson takes four characters, whatever they are
            elif stop not in "\"'":
                raise _Lost  # a control character


def _unescaped(text: str) -> str:
    if "\\" not in text:
        return text

    def replaced(found: re.Match[str]) -> str:
        code, letter = found.groups()
        if code is None:
            return ESCAPED.get(letter, letter)
        try:
            return chr(int(code, 16))  # like hjson, which lets spaces pass for digits
        except ValueError:
            raise _Lost from None

    # Two halves of a pair are one character.
    return ESCAPE.sub(replaced, text).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
