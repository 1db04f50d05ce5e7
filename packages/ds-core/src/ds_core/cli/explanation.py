"""An :class:`~ds_core.config.explain.Explanation` as lines of text and as JSON.

Text of our own instead of a table of rich's: a value too long for its column gets lines of the full width, where a
table would break it into a tower.
"""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

from ds_core.config.paths import dotted
from ds_core.config.showing import printable, without_secrets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ds_core.config.explain import Explanation, Group
    from ds_core.config.origins import Setting

__all__ = ["as_json", "heading", "lines", "written"]

WIDEST_KEY = 42
WIDEST_VALUE = 24
NARROWEST_ORIGIN = 22
GAP = "  "


def written(value: Any) -> str:
    """Return ``value`` as JSON, whole but without secrets; what JSON does not have as Python writes it.

    >>> written((1, None))
    '[1, null]'
    """
    return json.dumps(without_secrets(value), ensure_ascii=False, default=repr)


def heading(group: Group) -> str:
    """Return the line above a section's values."""
    name = group.name or "(top level)"
    return f"{name} ({group.state})" if group.state else name


def lines(explanation: Explanation, width: int) -> Iterator[tuple[str, bool]]:
    """Yield the lines of ``explanation``, and whether each is a heading; none is longer than ``width``.

    Args:
        explanation: what to print.
        width: columns of the terminal; 60 at least are used.
    """
    width = max(width, 60)
    for group in explanation.groups:
        if group.settings:
            yield heading(group), True
            yield from ((line, False) for line in _table(group, width))
            yield "", False
    count = len(list(explanation.left_out))
    if count:
        keys = "1 key at its default changes" if count == 1 else f"{count} keys at their defaults change"
        left_out = f"{keys} nothing here and {'is' if count == 1 else 'are'} left out; --all lists everything"
        yield from ((line, False) for line in _folded(left_out, width, ""))
        yield "", False
    if explanation.off:
        yield "Off, or all at the defaults (--all lists them)", True
        yield from ((line, False) for line in _folded(", ".join(explanation.off), width, "  "))
        yield "", False
    if explanation.notes:
        yield "Notes", True
        for note in explanation.notes:
            yield from ((line, False) for line in _folded(str(note), width, "    ", first="  - "))


def _table(group: Group, width: int) -> Iterator[str]:
    rows = [
        (
            _key(setting, group),
            "" if _is_blank(setting) else printable(written(setting.value)),
            setting.origin,
        )
        for setting in group.settings
    ]
    key_width = min(max(len(key) for key, _, _ in rows), WIDEST_KEY, width - 38)
    # With 80 columns the widest key leaves 10 to the value and 22 to the origin.
    room = width - 2 - key_width - 2 * len(GAP)
    value_width = min(max(len(value) for _, value, _ in rows), WIDEST_VALUE, max(room - NARROWEST_ORIGIN, 8))
    for key, value, origin in rows:
        # What is too long for its column has lines of its own.
        is_long, is_far = len(value) > value_width, len(origin) > room - value_width
        if is_long and key_width + len(value) + len(origin) <= width - 2 - 2 * len(GAP):
            is_long = is_far = False  # one line still holds all three
        is_wide = len(key) > key_width
        if is_wide:
            yield from _folded(key, width, "    ", first="  ")
        cells = (
            ("" if is_wide else key).ljust(key_width),
            ("" if is_long else value).ljust(value_width),
            "" if is_far else origin,
        )
        yield f"  {GAP.join(cells)}".rstrip()
        if is_long:
            yield from _folded(value, width, "    ")
        if is_far:
            yield from _folded(origin, width, "    ")


def _key(setting: Setting, group: Group) -> str:
    return dotted(setting.keys[1:]) if group.name and len(setting.keys) > 1 else setting.path


def _is_blank(setting: Setting) -> bool:
    return setting.kind == "open" and setting.value is None


def _folded(text: str, width: int, indent: str, *, first: str | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


def as_json(explanation: Explanation) -> dict[str, Any]:
    """Return ``explanation`` as JSON can hold it; problems are left to the caller."""
    return {
        "settings": [
            {"path": setting.path, "value": _plain(setting.value), "kind": setting.kind, "origin": setting.origin}
            for setting in explanation.settings
        ],
        "left_out": [setting.path for setting in explanation.left_out],
        "off": list(explanation.off),
        "notes": [{"kind": note.kind, "path": note.path, "text": note.text} for note in explanation.notes],
    }


def _plain(value: Any) -> Any:
    # JSON has no infinity.
    return json.loads(written(value), parse_constant=str)
