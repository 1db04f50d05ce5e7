"""``ds config migrate``: a configuration file in today's words, changed only where a deprecated key stands."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_core.config.migrate import Renamed, migrate
from ds_core.config.parsing import parse
from ds_core.config.problems import Problem, raise_problems
from ds_core.config.reading import read
from ds_core.config.spans import spans
from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ds_core.config.paths import Path as Keys
    from ds_core.config.spans import Span, Spans

__all__ = ["Rewritten", "read_exactly", "replace_file", "rewritten"]


@dataclass(frozen=True)
class Rewritten:
    """A text in today's words."""

    text: str
    """The same as before where nothing was to do."""
    renamed: tuple[Renamed, ...]
    """What was changed."""


def rewritten(text: str, where: str, *, drop_comments: bool = False) -> Rewritten:
    """Return the configuration ``text`` without its deprecated keys: the same values, read with fewer warnings.

    Order, layout, comments and the spelling of numbers stay. Other problems stay too: they are not touched.

    Args:
        text: JSON or HJSON.
        where: what errors call it.
        drop_comments: where comments cannot be kept, write plain JSON without them instead of raising.

    Raises:
        ConfigError: ``text`` cannot be read, has a key twice, or has a deprecated key that contradicts its
            replacement, so nobody knows what it means; or comments would be lost.

    >>> rewritten('{"bf16": {"check_overflow": true}, "train_batch_size": 1e3}', "x.json").text
    '{"bf16": {"check_grad_overflow": true}, "train_batch_size": 1e3}'
    """
    bare = text.removeprefix("\ufeff")
    parsed = parse(bare, where)
    twice = [Problem.at(keys, "is given twice in one object", "keep one of the two") for keys in parsed.twice]
    new, renamed, problems = migrate(parsed.value)
    raise_problems([*twice, *problems], where=where)
    if not renamed:
        return Rewritten(text, ())
    mark = text[: len(text) - len(bare)]
    changed = _edited(bare, parsed.value, new, renamed, is_plain_json=parsed.is_plain_json)
    if changed is None and not parsed.is_plain_json and not drop_comments:
        raise ConfigError(
            "its comments, or other forms that only HJSON has, cannot be kept where deprecated keys are rewritten",
            where=where,
            fix="rewrite the keys by hand (`ds config check` lists them), or let --drop-comments write plain JSON",
        )
    if changed is None:
        changed = json.dumps(new, indent=2, ensure_ascii=False) + "\n"
    return Rewritten(mark + changed, tuple(renamed))


def read_exactly(file: str) -> tuple[Path, str]:
    """Return the path of a configuration file and its text, with line ends and byte order mark as they are.

    Raises:
        ConfigError: there is no such file, or it is no configuration.
    """
    path = Path(read(Path(file)).where)
    return path, path.read_bytes().decode("utf-8")


def _edited(
    text: str, old: Mapping[str, Any], new: Mapping[str, Any], renamed: Sequence[Renamed], *, is_plain_json: bool
) -> str | None:
    """Return ``text`` changed from ``old`` to ``new`` in place, or None where that is not possible."""
    found = spans(text, is_plain_json=is_plain_json)
    if found is None:
        return None
    editor = _Editor(text, found, renamed, is_plain_json)
    editor.change(found.root, old, new, (), ())
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

    def __init__(self, text: str, found: Spans, renamed: Sequence[Renamed], is_plain_json: bool) -> None:
        self.text = text
        self.numbers = found.numbers
        self.renamed = renamed
        self.is_plain_json = is_plain_json
        self.edits: list[_Edit] = []

    def change(self, span: Span, old: Mapping[str, Any], new: Mapping[str, Any], was: Keys, path: Keys) -> None:
        """Collect what makes the object at ``span`` say ``new``, where it is at ``path``, not ``old``, at ``was``."""
        assert span.members is not None
        added = [key for key in new if key not in old]
        gone: list[str] = []
        for key, member in span.members.items():
            if key in new:
                self.value(member.value, old[key], new[key], (*was, key), (*path, key))
                continue
            replacement = self.replacement((*was, key), path, added)
            if replacement is None:
                gone.append(key)
                continue
            added.remove(replacement)
            self.edits.append(_Edit(member.start, member.key_end, self.key(replacement, self.text[member.start])))
            self.value(member.value, old[key], new[replacement], (*was, key), (*path, replacement))
        self.remove(span, gone, [f"{self.key(key)}: {self.written(new[key])}" for key in added])

    def replacement(self, was: Keys, path: Keys, added: Sequence[str]) -> str | None:
        """Return the key of the object at ``path`` that stands for the one at ``was`` now, or holds what does."""
        depth = len(path)
        for row in self.renamed:
            if row.old == was and row.new is not None and row.new[:depth] == path:
                name = str(row.new[depth])
                return name if name in added else None
        return None

    def value(self, span: Span, old: Any, new: Any, was: Keys, path: Keys) -> None:
        if isinstance(old, dict) and isinstance(new, dict) and span.members:
            self.change(span, old, new, was, path)
        elif old != new or isinstance(old, bool) != isinstance(new, bool):
            self.edits.append(_Edit(span.start, span.end, self.written(new)))

    def remove(self, span: Span, gone: Sequence[str], added: Sequence[str]) -> None:
        """Collect what takes the members ``gone`` out of an object and puts ``added`` behind the others."""
        members = span.members or {}
        names = list(members)
        stay = [name for name in names if name not in gone]
        if not stay:
            if names:
                start, end = members[names[0]].start, members[names[-1]].value.end
                between = self.text[self.blank_before(start) : start]
                self.edits.append(_Edit(start, end, f",{between}".join(added)))
            elif added:
                self.edits.append(_Edit(span.start, span.end, "{" + ", ".join(added) + "}"))
            return
        last = members[stay[-1]]
        for place, name in enumerate(names):
            if name in gone and names.index(stay[-1]) > place:
                # Up to the next key, whose place it takes.
                self.edits.append(_Edit(members[name].start, members[names[place + 1]].start, ""))
        between = self.text[self.blank_before(last.start) : last.start]
        before = between if not self.is_plain_json and "\n" in between else f",{between or ' '}"
        end = members[names[-1]].value.end
        if added or end != last.value.end:
            self.edits.append(_Edit(last.value.end, end, "".join(before + text for text in added)))

    def blank_before(self, at: int) -> int:
        while at > 0 and self.text[at - 1] in " \t\r\n":
            at -= 1
        return at

    def key(self, key: str, quote: str = '"') -> str:
        return json.dumps(key) if quote == '"' else key

    def written(self, value: Any) -> str:
        """Return ``value`` in one line of JSON; a number that the text has is spelled as there."""
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self.key(key)}: {self.written(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(self.written, value)) + "]"
        if isinstance(value, float) and value in self.numbers:
            return self.numbers[value]
        return json.dumps(value, ensure_ascii=False)


def replace_file(path: Path, text: str, *, backup: bool = False) -> Path | None:
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
