"""From what the user gave (mapping, path, base64 text) to a plain dict of its own."""

from __future__ import annotations

import base64
import binascii
import codecs
import functools
import itertools
import os
import pathlib
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ds_core.config.parsing import MAX_BYTES, MAX_DEPTH, parse, too_deep, too_large
from ds_core.config.positions import Lines, scan
from ds_core.config.problems import Problem
from ds_core.config.showing import printable, show
from ds_core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from ds_core.config.paths import Path

__all__ = ["Document", "Source", "copied", "read", "read_text"]

Source = Mapping[str, Any] | str | os.PathLike[str]

MAX_VALUES = 100_000
"""Values of a configuration, objects and lists counted with what is in them."""
MAX_KEY = 1000
"""Characters of a key: errors show keys whole."""


@dataclass(frozen=True)
class Document:
    """A configuration as the user gave it: not checked, and read once."""

    raw: dict[str, Any]
    """The whole of it; whoever gave it does not hold it, and nobody changes it."""
    where: str
    """``config dict``, ``base64 text``, or the path of the file."""
    twice: tuple[Path, ...] = ()
    """Keys that a file or base64 text gives twice in one object; ``raw`` has the last value."""
    text: str | None = None
    """The text of a file or of base64, with its line ends; None for a mapping."""
    is_plain_json: bool = True
    """Whether ``text`` is JSON; if not, it is HJSON (comments, unquoted keys, ...)."""
    has_mark: bool = False
    """Whether a byte order mark stands before ``text``."""
    file: pathlib.Path | None = None
    """The file, if it is one; ``where`` may be cut."""

    def duplicates(self) -> list[Problem]:
        """Return a problem for each key that is given twice."""
        return [Problem(path, "is given twice in one object", "keep one of the two") for path in self.twice]

    def position(self, path: Path) -> tuple[int, int] | None:
        """Return line and column, from 1, of a key; for a list index, of the value.

        For a key given twice it is the second one. None for a mapping, and where the place was not found. The text is
        scanned at the first call, and once.
        """
        return self._positions(tuple(path)) if self.text is not None else None

    @functools.cached_property
    def _positions(self) -> Callable[[Path], tuple[int, int] | None]:
        assert self.text is not None
        places, lines = scan(self.text, is_plain_json=self.is_plain_json), Lines(self.text)

        def position(path: Path) -> tuple[int, int] | None:
            offset = places.find(path) if path else None
            return None if offset is None else lines.position(offset)

        return position


def read(source: Source | Document) -> Document:
    """Return the configuration in ``source``, which is neither kept nor changed.

    Args:
        source: a mapping; the path of a JSON or HJSON file, where ``~`` is the home folder; urlsafe base64 of such
            text; or what was read before, which is returned as it is: a file may have changed since.

    Raises:
        ConfigError: there is no such file, it is not one object of JSON or HJSON, or it is beyond a limit.

    >>> read({"train_batch_size": 8}).raw
    {'train_batch_size': 8}
    """
    if isinstance(source, Document):
        return source
    if isinstance(source, Mapping):
        return Document(copied(source, where="config dict"), "config dict")
    if isinstance(source, os.PathLike):
        return _read_file(os.fsdecode(source))
    if isinstance(source, str):
        return _read_text_source(source)
    raise ConfigError(
        f"a configuration must be a dict, a path or base64 text, got {type(source).__name__}",
        fix='pass a dict such as {"train_micro_batch_size_per_gpu": 1}, or the path of a JSON file',
    )


def read_text(text: str, where: str) -> Document:
    """Return the configuration that ``text`` is.

    Args:
        text: JSON or HJSON, perhaps with a byte order mark.
        where: what errors call it.

    Raises:
        ConfigError: it is not one object of JSON or HJSON, or it is beyond a limit.
    """
    bare = text.removeprefix("\ufeff")
    parsed = parse(bare, where)
    raw = copied(parsed.value, where=where)
    return Document(raw, where, parsed.twice, bare, parsed.is_plain_json, has_mark=text.startswith("\ufeff"))


def copied(source: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Return a copy of ``source`` in which every mapping, list and tuple is new; other values are shared.

    Leaves may be objects that cannot be copied, such as process groups.

    Raises:
        ConfigError: it is beyond a limit (an object that contains itself is), or cannot be iterated over.
    """
    return _Copier(where).mapping(source, 1)


class _Copier:
    """Copies one configuration and counts its values: a few shared lists can stand for billions of them."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.values = 0

    def mapping(self, source: Mapping[str, Any], depth: int) -> dict[str, Any]:
        self.check_depth(depth)
        pairs = self.taken(source, lambda: ((key, value) for key, value in source.items() if hash(key) is not None))
        for key, _ in pairs:
            self.check_key(key)
        return {key: self.value(value, depth + 1) for key, value in pairs}

    def value(self, value: Any, depth: int) -> Any:
        if isinstance(value, Mapping):
            return self.mapping(value, depth)
        if isinstance(value, (list, tuple)):
            self.check_depth(depth)
            items = [self.value(item, depth + 1) for item in self.taken(value, lambda: value)]
            return tuple(items) if isinstance(value, tuple) else items
        return value

    def taken(self, source: Any, items: Callable[[], Iterable[Any]]) -> list[Any]:
        """Return what ``items`` yields, counted; the code of a foreign ``source`` runs only here."""
        try:
            found = list(itertools.islice(items(), MAX_VALUES - self.values + 1))
        except Exception as error:
            raise ConfigError(
                f"a {type(source).__name__} in the configuration cannot be read: {type(error).__name__}: {error}",
                where=self.where,
                fix="pass plain dicts and lists",
            ) from error
        self.values += len(found)
        if self.values > MAX_VALUES:
            raise ConfigError(
                f"the configuration has more than {MAX_VALUES} values",
                where=self.where,
                fix="remove what is not needed",
            )
        return found

    def check_depth(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise too_deep(self.where)

    def check_key(self, key: Any) -> None:
        if not isinstance(key, str):  # told with everything else, by its path
            return
        if len(key) > MAX_KEY:
            raise ConfigError(
                f"a key has {len(key)} characters, it may have {MAX_KEY}; it begins with {show(key)}",
                where=self.where,
                fix="shorten it",
            )
        if not key.isascii() and any("\ud800" <= letter <= "\udfff" for letter in key):
            raise ConfigError(
                f"a key has half of a character: {_printable(key)}", where=self.where, fix="write the character itself"
            )


def _read_text_source(text: str) -> Document:
    is_json = re.match(r"\s*\{", text) is not None
    if is_json or ("\n" in text and ":" in text):
        raise ConfigError(
            f"a configuration given as text must be a path or base64, got {'JSON' if is_json else 'HJSON'} itself",
            where=_printable(text, 40),
            fix="pass json.loads(text), or write the text to a file and pass its path",
        )
    if not text.strip():
        raise ConfigError("the path of the configuration is empty", fix="pass the path of a file, or a dict")
    if len(text) > 2 * MAX_BYTES:  # base64 makes four characters of three bytes
        raise too_large(f"the text has {len(text)} characters", "base64 text")
    if _status(_expanded(pathlib.Path(text))) is not None:
        return _read_file(text)
    decoded = _decoded(text)
    if decoded is None:
        raise _not_found(text)
    if len(decoded) > MAX_BYTES:
        raise too_large(f"the text has {len(decoded)} bytes", "base64 text")
    return read_text(decoded.decode("utf-8"), "base64 text")


def _decoded(text: str) -> bytes | None:
    """Return the configuration text that ``text`` encodes, or None where it is no base64 of one."""
    if re.fullmatch(r"[A-Za-z0-9_-]+={0,2}", text) is None:
        return None
    bare = text.rstrip("=")
    try:
        data = base64.urlsafe_b64decode(bare + "=" * (-len(bare) % 4))
        decoded = data.decode("utf-8-sig")
    except (binascii.Error, UnicodeDecodeError):
        return None
    # A mistyped file name can decode to anything; only text with an object or a key in it is a configuration.
    return data if decoded.lstrip().startswith("{") or ":" in decoded else None


def _status(path: pathlib.Path) -> os.stat_result | None:
    """Return what the system knows of ``path``; None where that cannot be a file."""
    try:
        return path.stat()
    except PermissionError as error:
        raise _unreadable(path, error) from error
    except (OSError, ValueError):  # not there, too long for a file name, or a null byte: base64, or nonsense
        return None


def _expanded(path: pathlib.Path) -> pathlib.Path:
    # Pathlib leaves ~ alone, and shells expand it only where it is not quoted. A file that is really called ~ wins.
    if not str(path).startswith("~") or _status(path) is not None:
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # there is no such user: then it is just a name
        return path


def _not_found(given: str) -> ConfigError:
    """Return the error for a path that is no file, with the nearest name there is."""
    path = _expanded(pathlib.Path(given))
    where, fix = f"working directory {_working_directory()}", "check the path"
    if str(path) != str(pathlib.Path(given)):
        where = _printable(str(path))
    looks_encoded = len(given) > 64 and re.fullmatch(r"[\w+=-]+", given, re.ASCII) is not None
    also = ", and the text is not base64 of a configuration either" if looks_encoded else ""
    if given.startswith("file://"):
        fix = "pass the path alone, without file://"
    elif len(path.name) < 256 and "\0" not in given:
        if not path.parent.is_dir():
            fix = f"check the path: there is no folder {_printable(str(path.parent))}"
        elif close := nearest(path.name, _names(path.parent)):
            fix = f'did you mean "{_printable(str(pathlib.Path(given).with_name(close)))}"?'
    return ConfigError(f"file not found: {_printable(given)}{also}", where=where, fix=fix)


def _working_directory() -> str:
    try:
        return _printable(str(pathlib.Path.cwd()))
    except FileNotFoundError:
        return "that was deleted"


def _names(folder: pathlib.Path) -> list[str]:
    try:
        return [entry.name for entry in itertools.islice(folder.iterdir(), 1000)]
    except PermissionError:  # a folder may be open to those who know the name; then there is no nearest
        return []


def _read_file(given: str) -> Document:
    path = _expanded(pathlib.Path(given))
    where = _printable(str(path))
    status = _status(path)
    if status is None:
        raise _not_found(given)
    if stat.S_ISDIR(status.st_mode):
        raise ConfigError(
            "the file cannot be read: Is a directory", where=where, fix="pass the path of a file in that folder"
        )
    if not stat.S_ISREG(status.st_mode):  # reading may never end, or wait for somebody to write
        raise ConfigError(
            "this is a pipe, a socket or a device, not a file", where=where, fix="write the text to a file"
        )
    if status.st_size > MAX_BYTES:
        raise too_large(f"the file has {status.st_size} bytes", where)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # it may have grown, and files of /proc have no size
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) > MAX_BYTES:
        raise too_large(f"the file has more than {MAX_BYTES} bytes", where)
    return replace(read_text(_as_text(data, where), where), file=path)


def _unreadable(path: pathlib.Path, error: OSError) -> ConfigError:
    fix = "check the path"
    if isinstance(error, PermissionError):
        fix = "give the user who runs this the right to read it"
    return ConfigError(f"the file cannot be read: {error.strerror}", where=_printable(str(path)), fix=fix)


def _as_text(data: bytes, where: str) -> str:
    # The mark of UTF-32 begins with that of UTF-16.
    for name, marks in (
        ("UTF-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
        ("UTF-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
    ):
        if data.startswith(marks):
            raise ConfigError(f"the file is text in {name}, not in UTF-8", where=where, fix="save it as UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the file is not text in UTF-8: {error.reason} at byte {error.start}", where=where, fix="save it as UTF-8"
        ) from error


def _printable(text: str, limit: int = 200) -> str:
    """Return the beginning of ``text``, with escapes for what a terminal cannot show."""
    return printable(text[:limit])
