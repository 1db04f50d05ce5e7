"""``ds config migrate``: a configuration file in today's words, changed only where a deprecated key stands."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ds_core.config.migrate import Renamed, migrate
from ds_core.config.parsing import parse
from ds_core.config.positions import scan
from ds_core.config.problems import raise_problems
from ds_core.errors import ConfigError

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Mapping, Sequence

    from ds_core.config.paths import Path
    from ds_core.config.positions import Place
    from ds_core.config.reading import Document

__all__ = ["Rewritten", "replace_file", "rewritten"]


@dataclass(frozen=True)
class Rewritten:
    """A text in today's words."""

    text: str
    """The same as before where nothing was to do."""
    renamed: tuple[Renamed, ...]
    """What was changed."""


def rewritten(document: Document, *, drop_comments: bool = False) -> Rewritten:
    """Return a configuration without its deprecated keys: the same values, read with fewer warnings.

    Order, layout, comments and the spelling of numbers stay. Other problems stay too: they are not touched.

    Args:
        document: what was read from a file or base64 text.
        drop_comments: where comments cannot be kept, write plain JSON without them instead of raising.

    Raises:
        ConfigError: it has a key twice, or a deprecated key that contradicts its replacement, so nobody knows what it
            means; or comments would be lost.

    >>> from ds_core.config.reading import read_text
    >>> rewritten(read_text('{"bf16": {"check_overflow": true}, "train_batch_size": 1e3}', "x.json")).text
    '{"bf16": {"check_grad_overflow": true}, "train_batch_size": 1e3}'
    """
    assert document.text is not None, "a mapping has no text"
    new, renamed, problems = migrate(document.raw)
    raise_problems([*document.duplicates(), *problems], where=document.where)
    text = _edited(document.text, document, new, renamed) if renamed else document.text
    if text is None and not document.is_plain_json and not drop_comments:
        raise ConfigError(
            "its comments, or other forms that only HJSON has, cannot be kept where deprecated keys are rewritten",
            where=document.where,
            fix="rewrite the keys by hand (`ds config check` lists them), or let --drop-comments write plain JSON",
        )
    if text is None:
        text = json.dumps(new, indent=2, ensure_ascii=False) + "\n"
    return Rewritten("\ufeff" * document.has_mark + text, tuple(renamed))


def _edited(text: str, document: Document, new: Mapping[str, Any], renamed: Sequence[Renamed]) -> str | None:
    """Return ``text``, that of ``document``, changed in place to say ``new``; None where that is not possible."""
    found = scan(text, is_plain_json=document.is_plain_json, notes=True)
    if not found.is_whole:
        return None
    editor = _Editor(text, found.numbers, renamed, document.is_plain_json)
    editor.change(found.root, document.raw, new, (), ())
    if any(start < edit.end and edit.start < end for edit in editor.edits for start, end in found.comments):
        return None
    result = text
    for edit in sorted(editor.edits, key=lambda edit: edit.start, reverse=True):
        result = result[: edit.start] + edit.text + result[edit.end :]
    try:
        # HJSON has strings without an end of their own, so what was written is read again before it is trusted.
        value = parse(result, "what was written").value
    except ConfigError:
        return None
    return result if value == new else None


@dataclass(frozen=True)
class _Edit:
    start: int
    end: int
    text: str


class _Editor:
    """Collects the changes of one text."""

    def __init__(
        self, text: str, numbers: Mapping[float, str], renamed: Sequence[Renamed], is_plain_json: bool
    ) -> None:
        self.text = text
        self.numbers = numbers
        self.renamed = renamed
        self.is_plain_json = is_plain_json
        self.edits: list[_Edit] = []

    def change(self, place: Place, old: Mapping[str, Any], new: Mapping[str, Any], was: Path, path: Path) -> None:
        """Collect what makes the object at ``place`` say ``new``, where it is at ``path``, not ``old``, at ``was``."""
        added = [key for key in new if key not in old]
        gone: list[str] = []
        for key, member in _members(place).items():
            if key in new:
                self.value(member, old[key], new[key], (*was, key), (*path, key))
                continue
            replacement = self.replacement((*was, key), path, added)
            if replacement is None:
                gone.append(key)
                continue
            added.remove(replacement)
            written = json.dumps(replacement) if self.text[member.offset] in "\"'" else replacement
            self.edits.append(_Edit(member.offset, member.key_end, written))
            self.value(member, old[key], new[replacement], (*was, key), (*path, replacement))
        self.remove(place, gone, [f"{json.dumps(key)}: {self.written(new[key])}" for key in added])

    def replacement(self, was: Path, path: Path, added: Sequence[str]) -> str | None:
        """Return the key of the object at ``path`` that stands for the one at ``was`` now, or holds what does."""
        depth = len(path)
        for row in self.renamed:
            if row.old == was and row.new is not None and row.new[:depth] == path:
                name = str(row.new[depth])
                return name if name in added else None
        return None

    def value(self, place: Place, old: Any, new: Any, was: Path, path: Path) -> None:
        if isinstance(old, dict) and isinstance(new, dict) and old:
            self.change(place, old, new, was, path)
        elif old != new or isinstance(old, bool) != isinstance(new, bool):
            self.edits.append(_Edit(place.start, place.end, self.written(new)))

    def remove(self, place: Place, gone: Sequence[str], added: Sequence[str]) -> None:
        """Collect what takes the members ``gone`` out of an object and puts ``added`` behind the others."""
        members = _members(place)
        names = list(members)
        stay = [name for name in names if name not in gone]
        if not stay:
            if names:
                start, end = members[names[0]].offset, members[names[-1]].end
                between = self.text[self.blank_before(start) : start]
                self.edits.append(_Edit(start, end, f",{between}".join(added)))
            elif added:
                self.edits.append(_Edit(place.start, place.end, "{" + ", ".join(added) + "}"))
            return
        last = members[stay[-1]]
        for name, following in itertools.pairwise(names[: names.index(stay[-1]) + 1]):
            if name in gone:
                # Up to the next key, whose place it takes.
                self.edits.append(_Edit(members[name].offset, members[following].offset, ""))
        between = self.text[self.blank_before(last.offset) : last.offset]
        before = between if not self.is_plain_json and "\n" in between else f",{between or ' '}"
        end = members[names[-1]].end
        if added or end != last.end:
            self.edits.append(_Edit(last.end, end, "".join(before + text for text in added)))

    def blank_before(self, at: int) -> int:
        while at > 0 and self.text[at - 1] in " \t\r\n":
            at -= 1
        return at

    def written(self, value: Any) -> str:
        """Return ``value`` in one line of JSON; a number that the text has is spelled as there."""
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)}: {self.written(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(self.written, value)) + "]"
        if isinstance(value, float) and value in self.numbers:
            return self.numbers[value]
        return json.dumps(value, ensure_ascii=False)


def _members(place: Place) -> dict[str, Place]:
    """Return the keys of the object at ``place``, in their order."""
    return {key: inner for key, inner in place.inside.items() if isinstance(key, str)}


def replace_file(path: pathlib.Path, text: str, *, backup: bool = False) -> pathlib.Path | None:
    """Write ``text`` to ``path``, whole or not at all; permissions of a file that is there stay, as does a link.

    Args:
        path: a file, which need not be there yet.
        text: written as UTF-8, line ends as they are.
        backup: keep what was there beside it, with ``.bak`` behind its name.

    Returns:
        The path of the backup, if one was asked for.

    Raises:
        ConfigError: it cannot be written; then it is as it was.
    """
    target = path.resolve()
    is_new = not target.exists()
    if not is_new and not target.is_file():
        raise ConfigError("it is not a file, and cannot be replaced by one", where=str(path), fix="give another path")
    saved = target.with_name(f"{target.name}.bak") if backup and not is_new else None
    if saved is not None and saved.exists():
        raise ConfigError("the backup of an earlier run is still there", where=str(saved), fix="move it away")
    # Beside the file: a rename is atomic within a file system only.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if saved is not None:
            shutil.copy2(target, saved)
        try:
            # Until it has the permissions of what it replaces, nobody else may read it.
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if is_new else 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(text.encode("utf-8"))
                file.flush()
                # Before the rename: else a machine that stops may have the new name and no content.
                os.fsync(file.fileno())
            if not is_new:
                shutil.copymode(target, temporary)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(
            f"the file cannot be written: {error.strerror or error}", where=str(path), fix="check folder and disk"
        ) from error
    return saved
