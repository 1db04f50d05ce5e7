"""Where the values of a configuration came from: the file's lines, the caller, a default, or other values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ds_core.config.paths import Path, dotted
from ds_core.config.section import AUTO, Section, show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ds_core.config.loading import Examined

__all__ = ["Kind", "Origins", "Setting", "given_default"]

Kind = Literal["file", "caller", "default", "derived", "open"]
"""``open``: there is no value yet; it has a problem, or waits for a number."""


@dataclass(frozen=True)
class Setting:
    """One value that holds, and why it does."""

    keys: Path
    """The way to it, in the names DeepSpeed has for the keys."""
    value: Any
    """What holds; for kind ``open`` what was written, or None."""
    kind: Kind
    """The kind of origin."""
    origin: str
    """The origin in words, such as ``line 12``."""
    is_given: bool = False
    """Whether something was written there, be it null or ``"auto"``."""

    @property
    def path(self) -> str:
        """The way to it as people write it, ``zero_optimization.stage``."""
        return dotted(self.keys)


class Origins:
    """Knows where each key of one configuration was written."""

    def __init__(self, examined: Examined) -> None:
        self._document = examined.document
        self._old = {row.new: row.old for row in examined.renamed if row.new is not None}
        self._dropped = {problem.keys for problem in examined.warnings}
        is_file = self._document.text is not None and self._document.where != "base64 text"
        self.kind: Literal["file", "caller"] = "file" if is_file else "caller"
        """The kind of everything that was written."""

    def kept(self, raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """Return ``raw``, the object at ``path``, without the keys that compatibility mode dropped."""
        return {key: value for key, value in raw.items() if (*path, key) not in self._dropped}

    def place(self, keys: Path) -> str:
        """Return where the key at ``keys`` (in today's words) was written: ``line 9, as cpu_offload (deprecated)``."""
        written, old = keys, None
        for length in range(len(keys), 0, -1):
            if keys[:length] in self._old:
                old = self._old[keys[:length]]
                written = old + keys[length:]
                break
        place = self._place(written)
        if old is None:
            return place
        if old == keys[: len(old)]:
            return f"{place}, in a deprecated form"
        return f"{place}, {'as' if length == len(keys) or self._is_leaf(old) else 'in'} {old[-1]} (deprecated)"

    def _place(self, keys: Path) -> str:
        if self._document.text is None:
            return "caller"
        if self.kind == "caller":
            return "base64 text"
        for length in range(len(keys), 0, -1):
            # What a deprecated key stands for is written nowhere; the key itself is.
            position = self._document.position(keys[:length])
            if position is not None:
                return f"line {position[0]}"
        return "file"

    def _is_leaf(self, keys: Path) -> bool:
        value: Any = self._document.raw
        for key in keys:
            value = value[key]
        return not isinstance(value, (Mapping, list))

    def written(self, keys: Path, value: Any, shown: Path | None = None) -> Setting:
        """Return the setting of a value that was written at ``keys`` and holds as it is."""
        return Setting(shown or keys, value, self.kind, self.place(keys), is_given=True)

    def open(self, keys: Path, value: Any, needs: str) -> Setting:
        """Return the setting of a value that was written at ``keys`` and cannot hold."""
        return Setting(keys, value, "open", f"{self.place(keys)}, {needs}", is_given=True)

    def section(self, section: Section, raw: Any, written: Path, shown: Path) -> Iterator[Setting]:
        """Yield the settings of ``section``, in its order, those of sections inside it included.

        Args:
            section: the checked section.
            raw: what was written there; None where nothing was.
            written: the way to it in the words that were used.
            shown: the way to it in DeepSpeed's words.
        """
        model = type(section)
        given = self.kept(raw, written) if isinstance(raw, Mapping) else {}
        # A form of its own, such as true for a whole section, gives every key that is not at its default.
        is_legacy = raw is not None and raw != AUTO and not isinstance(raw, Mapping)
        key_of = {model.fields_by_key().get(key): key for key in given}
        for field, info in model.model_fields.items():
            key = info.serialization_alias or field
            value, inner = getattr(section, field), (*shown, key)
            if field in key_of:
                yield from self._value(value, given[key_of[field]], (*written, key_of[field]), inner)
            elif value == info.get_default(call_default_factory=True):
                yield from (Setting(keys, leaf, "default", "default") for keys, leaf in _leaves(value, inner))
            elif is_legacy:
                yield from self._value(value, raw, written, inner)
            else:
                yield from (Setting(keys, leaf, "derived", "derived") for keys, leaf in _leaves(value, inner))
        for key, value in given.items():
            if key not in model.fields_by_key():  # options of plugins, and old forms that the section rewrites
                yield from self.as_written(value, (*written, key), (*shown, key))

    def _value(self, value: Any, raw: Any, written: Path, shown: Path) -> Iterator[Setting]:
        """Yield the settings of ``value``, which ``raw`` was read as."""
        if isinstance(value, Section):
            yield from self.section(value, raw, written, shown)
        elif _holds_sections(value):
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            for name, item in pairs:
                yield from self._value(item, _at(raw, name), (*written, name), (*shown, name))
        elif raw == AUTO or (raw is None and value is not None):
            for keys, leaf in _leaves(value, shown):
                yield given_default(keys, leaf, raw)
        elif isinstance(value, Mapping) and value and isinstance(raw, Mapping):
            for name, item in value.items():
                yield from self._value(item, _at(raw, name), (*written, name), (*shown, name))
        else:
            yield self.written(written, value, shown)

    def as_written(self, raw: Any, written: Path, shown: Path | None = None) -> Iterator[Setting]:
        """Yield the settings of a value that nothing checks: each key of it, however deep."""
        shown = shown or written
        if isinstance(raw, Mapping) and raw:
            for key, value in self.kept(raw, written).items():
                # A caller's dict may have keys of any type, which is a problem that is told elsewhere.
                yield from self.as_written(value, (*written, str(key)), (*shown, str(key)))
        else:
            yield self.written(written, raw, shown)


def given_default(keys: Path, value: Any, raw: Any) -> Setting:
    """Return the setting of a default that was asked for: ``raw`` is null or ``"auto"``."""
    return Setting(keys, value, "default", f"default, for {show(raw)}", is_given=True)


def _leaves(value: Any, keys: Path) -> Iterator[tuple[Path, Any]]:
    """Yield every value inside ``value`` that is no section, and no object with keys."""
    if isinstance(value, Section):
        for field, info in type(value).model_fields.items():
            yield from _leaves(getattr(value, field), (*keys, info.serialization_alias or field))
        for key, item in (value.__pydantic_extra__ or {}).items():
            yield from _leaves(item, (*keys, key))
    elif isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, (*keys, key))
    elif _holds_sections(value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*keys, index))
    else:
        yield keys, value


def _holds_sections(value: Any) -> bool:
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(isinstance(item, Section) for item in items)


def _at(raw: Any, key: Any) -> Any:
    try:
        return raw[key]
    except (KeyError, IndexError, TypeError):  # made by a legacy form of the section
        return None
