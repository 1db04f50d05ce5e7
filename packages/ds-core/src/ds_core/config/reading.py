"""From what the user gave (mapping, path, base64 text) to a plain dict of its own."""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_core.config.section import show
from ds_core.errors import ConfigError

__all__ = ["Document", "Keys", "Source", "copied", "read"]

Source = Mapping[str, Any] | str | os.PathLike[str]
Keys = tuple[str | int, ...]
"""The way to a value: keys of objects and indexes of lists."""

MAX_DEPTH = 64
"""Objects inside objects; no configuration needs more, and unbounded depth would exhaust the stack."""


@dataclass(frozen=True)
class Document:
    """A configuration as the user gave it: not checked, and read once."""

    raw: dict[str, Any]
    """The whole of it; nobody else holds it."""
    where: str
    """``config dict``, ``base64 text``, or the path of the file."""
    twice: tuple[Keys, ...] = ()
    """Keys that a file or base64 text gives twice in one object; ``raw`` has the last value."""
    text: str | None = None
    """The text of a file or of base64; None for a mapping."""
    is_plain_json: bool = True
    """Whether ``text`` is JSON; if not, it is HJSON (comments, unquoted keys, ...)."""

    def position(self, keys: Keys) -> tuple[int, int] | None:
        """Return line and column, from 1, of a key (of the value for a list index); None where it was not found."""
        return None


def read(source: Source) -> Document:
    """Return the configuration in ``source``, which is neither kept nor changed.

    Raises:
        ConfigError: there is no such file, or it is not one object of JSON or HJSON.
    """
    if isinstance(source, Mapping):
        return Document(copied(source, where="config dict"), "config dict")
    if isinstance(source, os.PathLike):
        return _read_file(Path(source))
    if isinstance(source, str):
        return _read_text_source(source)
    raise ConfigError(
        f"a configuration must be a dict, a path or base64 text, got {type(source).__name__}",
        fix='pass a dict such as {"train_micro_batch_size_per_gpu": 1}, or the path of a JSON file',
    )


def copied(source: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Return a copy of ``source`` in which every mapping, list and tuple is new; other values are shared.

    Leaves may be objects that cannot be copied, such as process groups.
    """
    return {key: _copied(value, 1, where) for key, value in source.items()}


def _copied(value: Any, depth: int, where: str) -> Any:
    if depth > MAX_DEPTH:
        raise _too_deep(where)
    if isinstance(value, Mapping):
        return {key: _copied(item, depth + 1, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_copied(item, depth + 1, where) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def _read_text_source(text: str) -> Document:
    if text.lstrip().startswith("{"):
        raise ConfigError(
            "a configuration given as text must be a path or base64, got JSON itself",
            where=text[:40],
            fix="pass json.loads(text), or write the text to a file and pass its path",
        )
    try:
        exists = Path(text).exists()
    except (OSError, ValueError):  # too long for a file name, or a null byte: base64, or nonsense
        exists = False
    if exists:
        return _read_file(Path(text))
    decoded = _decoded(text)
    if decoded is not None:
        return _parse(decoded, "base64 text")
    looks_encoded = len(text) > 64 and re.fullmatch(r"[\w+=-]+", text, re.ASCII) is not None
    also = ", and the text is not base64 of a configuration either" if looks_encoded else ""
    raise ConfigError(
        f"file not found: {text[:200]}{also}",
        where=f"working directory {Path.cwd()}",
        fix="check the path",
    )


def _decoded(text: str) -> str | None:
    """Return the configuration text that ``text`` encodes, or None where it is no base64 of one."""
    if re.fullmatch(r"[A-Za-z0-9_-]+={0,2}", text) is None:
        return None
    try:
        decoded = base64.urlsafe_b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4)).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        return None
    # A mistyped file name can decode to anything; only text with an object or a key in it is a configuration.
    return decoded if decoded.lstrip().startswith("{") or ":" in decoded else None


def _read_file(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"file not found: {path}", where=f"working directory {Path.cwd()}", fix="check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the file is not text in UTF-8: {error.reason} at byte {error.start}",
            where=str(path),
            fix="save it as UTF-8",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"the file cannot be read: {error.strerror}", where=str(path), fix="check the path"
        ) from error
    return _parse(text, str(path))


def _too_deep(where: str) -> ConfigError:
    return ConfigError(f"objects are nested more than {MAX_DEPTH} deep", where=where, fix="remove the nesting")


class _Object(dict[str, Any]):
    """An object of a file, which remembers the keys it was given twice."""

    def __init__(self, items: list[tuple[str, Any]]) -> None:
        super().__init__(items)
        self.twice = [key for key, count in Counter(key for key, _ in items).items() if count > 1]


def _parse(text: str, where: str) -> Document:
    try:
        value, is_plain_json = _loads(text)
    except RecursionError:
        raise ConfigError(
            f"objects are nested more than {MAX_DEPTH} deep", where=where, fix="remove the nesting"
        ) from None
    except ValueError as error:
        raise ConfigError(f"this is neither JSON nor HJSON: {error}", where=where, fix="correct the syntax") from error
    if not isinstance(value, _Object):
        raise ConfigError(
            f"a configuration must be one object {{ ... }}, got {show(value)}", where=where, fix="put it in braces"
        )
    return Document(copied(value, where=where), where, tuple(_given_twice(value, ())), text, is_plain_json)


def _loads(text: str) -> tuple[Any, bool]:
    try:
        return json.loads(text, object_pairs_hook=_Object), True
    except json.JSONDecodeError:
        # Comments, unquoted keys, trailing commas. Only on demand: most files are plain JSON, which parses far faster.
        import hjson

        return hjson.loads(text, object_pairs_hook=_Object), False


def _given_twice(value: Any, path: Keys) -> Iterator[Keys]:
    if isinstance(value, _Object):
        yield from ((*path, key) for key in value.twice)
    items: Iterable[tuple[str | int, Any]] = value.items() if isinstance(value, _Object) else enumerate(value)
    for place, item in items:
        if isinstance(item, (_Object, list)):
            yield from _given_twice(item, (*path, place))
