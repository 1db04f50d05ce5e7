"""From where to where the keys and values of a JSON or HJSON text reach, for changes that leave the rest as it is.

Stricter than hjson: a form that is rare in HJSON has no spans, and whoever asked must do without.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from ds_core.config.positions import BARE_KEY, BLANK, JSON_CONSTANT, LITERAL, REST_OF_LINE, STRING_STOP

__all__ = ["Member", "Span", "Spans", "spans"]


@dataclass
class Span:
    """A value: ``text[start:end]``."""

    start: int
    end: int
    members: dict[str, Member] | None = None
    """The keys of an object in their order; None for anything else."""


@dataclass
class Member:
    """A key of an object, with its quotes where it has any, and its value."""

    start: int
    key_end: int
    value: Span


@dataclass
class Spans:
    """The spans of one text."""

    root: Span
    comments: list[tuple[int, int]] = field(default_factory=list)
    """From where to where each comment reaches."""
    numbers: dict[float, str] = field(default_factory=dict)
    """Each number with a point or an exponent -> how it is written."""


def spans(text: str, *, is_plain_json: bool) -> Spans | None:
    """Return the spans of ``text``, which was parsed before; None where it has a form that is not known here.

    >>> found = spans('{"a": 5e8} # often', is_plain_json=False)
    >>> found.root.members["a"].value, found.comments, found.numbers
    (Span(start=6, end=9, members=None), [(11, 18)], {500000000.0: '5e8'})
    """
    walker = _Walker(text, is_plain_json)
    try:
        return walker.walk()
    except _Unknown:
        return None


class _Unknown(Exception):  # noqa: N818 - told by None
    """A form that is not known here."""


class _Walker:
    """Recursive: a text that was parsed before is at most 64 levels deep."""

    def __init__(self, text: str, is_plain_json: bool) -> None:
        self.text = text
        self.is_plain_json = is_plain_json
        self.found = Spans(Span(0, 0))

    def walk(self) -> Spans:
        start = self.skip(0)
        if self.text.startswith("{", start):
            self.found.root = self.object(start)
        else:  # a root without braces
            members, end = self.members(start, "")
            self.found.root = Span(start, end, members)
        if self.skip(self.found.root.end) != len(self.text):
            raise _Unknown
        return self.found

    def skip(self, at: int) -> int:
        """Return where the next thing that is neither space nor comment begins."""
        while True:
            blank = BLANK.match(self.text, at)
            if blank:
                end = blank.end()
            elif self.text.startswith("/*", at):
                end = self.text.find("*/", at + 2) + 2
                if end < 2:
                    raise _Unknown
            else:
                return at
            if self.text[at] in "#/" and (at, end) not in self.found.comments:
                self.found.comments.append((at, end))
            at = end

    def object(self, start: int) -> Span:
        members, end = self.members(start + 1, "}")
        return Span(start, end + 1, members)

    def members(self, at: int, closing: str) -> tuple[dict[str, Member], int]:
        """Return the members from ``at`` on and where the closing bracket stands; the end of the text without one."""
        members: dict[str, Member] = {}
        at = self.skip(at)
        while at < len(self.text) and self.text[at] != closing:
            name, key_end = self.key(at)
            colon = self.skip(key_end)
            if name in members or not self.text.startswith(":", colon):
                raise _Unknown
            value = self.value(self.skip(colon + 1))
            members[name] = Member(at, key_end, value)
            at = self.comma(value.end)
        if closing and at == len(self.text):
            raise _Unknown
        return members, at

    def comma(self, at: int) -> int:
        at = self.skip(at)
        return self.skip(at + 1) if self.text.startswith(",", at) else at

    def key(self, at: int) -> tuple[str, int]:
        if self.text[at] == '"':
            end = self.string(at)
            name: str = json.loads(self.text[at:end])
            return name, end
        bare = BARE_KEY.match(self.text, at)
        if bare is None or self.text[at] == "'":
            raise _Unknown
        return bare.group(), bare.end()

    def value(self, at: int) -> Span:
        first = self.text[at : at + 1]
        if first == "{":
            return self.object(at)
        if first == "[":
            end = self.skip(at + 1)
            while not self.text.startswith("]", end):
                end = self.comma(self.value(end).end)
            return Span(at, end + 1)
        if first == '"':
            return Span(at, self.string(at))
        if first in ("", "'", "}", "]", ",", ":"):
            raise _Unknown
        literal = LITERAL.match(self.text, at) or (JSON_CONSTANT.match(self.text, at) if self.is_plain_json else None)
        rest = literal or REST_OF_LINE.match(self.text, at)
        assert rest is not None  # the last one matches nothing, too
        written = rest.group().rstrip()
        if literal and any(sign in written for sign in ".eE") and written[-1].isdigit():
            self.found.numbers[float(written)] = written
        return Span(at, at + len(written))

    def string(self, at: int) -> int:
        """Return the end of the string in double quotes that begins at ``at``."""
        at += 1
        while True:
            stop = STRING_STOP.search(self.text, at)
            if stop is None:
                raise _Unknown
            at = stop.end() + (stop.group() == "\\")
            if stop.group() == '"':
                return at
            if stop.group() not in "\"'\\":
                raise _Unknown  # a control character
