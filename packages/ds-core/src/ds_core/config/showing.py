"""Values as messages and tables show them: as JSON, short, with nothing a terminal would obey, and without secrets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

__all__ = ["HIDDEN", "Secret", "is_secret", "printable", "show", "without_secrets"]

HIDDEN = "..."
"""What is shown in place of a secret."""
SECRET = re.compile(
    r"api[-_. ]?k|passw|secret|credential|(?:access|auth|bearer|private)[-_. ]?(?:key|token)|^token$", re.IGNORECASE
)


class Secret:
    """Marks a key whose value is shown nowhere: :data:`HIDDEN` stands in its place.

    ::

        api_key: Annotated[str | None, Secret()] = None
    """


def is_secret(key: object) -> bool:
    """Return whether ``key`` sounds like one of a secret.

    For keys that no class declares: what is misspelt, or stands in the wrong section, is shown too.

    >>> is_secret("api-keey"), is_secret("max_tokens")
    (True, False)
    """
    return isinstance(key, str) and SECRET.search(key) is not None


def without_secrets(data: Any) -> Any:
    """Return a copy of ``data`` that may be shown.

    >>> without_secrets({"comet": {"api_key": "1f", "online": True}})
    {'comet': {'api_key': '...', 'online': True}}
    """
    if isinstance(data, Mapping):
        return {key: _hidden(key, without_secrets(value)) for key, value in data.items()}
    return [without_secrets(item) for item in data] if isinstance(data, (list, tuple)) else data


def _hidden(key: object, value: Any) -> Any:
    return HIDDEN if is_secret(key) and not (value is None or isinstance(value, bool)) else value


def printable(text: str) -> str:
    """Return ``text`` with JSON's escapes for what a terminal would obey, or nobody sees; letters of all scripts stay.

    >>> print(printable("größe" + chr(0x202E) + chr(0x9B)))
    größe\\u202e\\u009b
    """
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    if letter.isprintable():
        return letter
    # JSON leaves DEL as it is.
    return "\\u007f" if letter == "\x7f" else json.dumps(letter)[1:-1]


def show(value: Any, *, limit: int = 60) -> str:
    """Return ``value`` as a user would write it in JSON, printable, without secrets, cut to ``limit`` characters.

    >>> show({"enabled": True})
    '{"enabled": true}'
    """
    text = printable(_json(value, depth=3)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _json(value: Any, depth: int) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return _json(value.value, depth)
    if isinstance(value, str):
        return json.dumps(value[:1000], ensure_ascii=False)
    if isinstance(value, Mapping):
        inner = (f"{_json(name, 0)}: {_json(_hidden(name, item), depth - 1)}" for name, item in _first(value.items()))
        return "{" + ", ".join(inner) + "}" if depth > 0 else "{...}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_json(item, depth - 1) for item in _first(value)) + "]" if depth > 0 else "[...]"
    if isinstance(value, int) and value.bit_length() > 4000:  # Python refuses to write whole numbers of 4300 digits
        return f"{'-' if value < 0 else ''}2**{value.bit_length() - 1} or more"
    try:
        return repr(value)
    except Exception:  # a stranger's object; that it cannot be shown must not hide what is wrong with it
        return f"an object of type {type(value).__name__}"


def _first(items: Any) -> list[Any]:
    # Messages show the beginning only; a list of a million entries must not be printed first and cut afterwards.
    return [item for item, _ in zip(items, range(20), strict=False)]
