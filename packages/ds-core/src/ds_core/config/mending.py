"""Putting right what has a problem, as its author probably meant it, so that the rest can be looked at too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ds_core.config.problems import as_written

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ds_core.config.paths import Path
    from ds_core.config.problems import Problem

__all__ = ["is_consequence", "put_right"]

GONE = object()
"""Stands for a key that is not there; None may be a key."""


def put_right(raw: dict[str, Any], problems: Sequence[Problem], guessed: dict[Path, Path] | None) -> None:
    """Take the keys of ``problems`` out of ``raw``, or move them to where they were meant to be.

    Args:
        raw: changed in place.
        problems: all problems of ``raw``.
        guessed: takes what was moved, new path -> old path; None: nothing is moved.
    """
    changed = False
    by_keys = {problem.keys: problem for problem in problems}
    for keys, problem in by_keys.items():
        # The section that lacks a key goes as a whole.
        holder, key = _deepest(raw, keys[:-1] if problem.kind == "missing" else keys)
        if key is GONE:
            continue  # it went with the section that held it
        changed, value = True, holder.pop(key)
        meant = problem.meant
        if guessed is not None and meant is not None and meant not in by_keys and _place(raw, meant, value):
            guessed[meant] = as_written(keys, guessed)
    if not changed:
        # A place that is nowhere in what was written: the innermost section around it goes.
        keys = problems[0].keys
        around = (_deepest(raw, keys[:length]) for length in range(len(keys), 0, -1))
        holder, key = next(found for found in around if found[1] is not GONE)
        del holder[key]


def _deepest(raw: dict[str, Any], keys: Path) -> tuple[dict[Any, Any], Any]:
    """Return the innermost object along ``keys`` and its key there; the key is ``GONE`` where it is not there (now)."""
    holder: dict[Any, Any] = raw
    key = _key_in(holder, keys[0])
    for part in keys[1:]:
        inner = holder.get(key)
        if not isinstance(inner, dict):
            # An entry of a list, or a value that was rewritten: what holds it goes.
            return holder, key
        holder, key = inner, _key_in(inner, part)
    return holder, key


def _key_in(holder: Mapping[Any, Any], part: str | int) -> Any:
    """Return the key of ``holder`` that is called ``part``, or ``GONE``; a key may be no text."""
    return part if part in holder else next((key for key in holder if str(key) == part), GONE)


def _place(raw: dict[str, Any], keys: Path, value: Any) -> bool:
    """Put ``value`` at ``keys`` if a section is there to hold it and lacks that key; return whether it did."""
    holder: Any = raw
    for part in keys[:-1]:
        holder = holder.get(part) if isinstance(holder, dict) else None
    if not isinstance(holder, dict) or keys[-1] in holder:
        return False
    holder[keys[-1]] = value
    return True


def is_consequence(problem: Problem, told: Sequence[Problem]) -> bool:
    """Return whether a key is missing only because it was wrong, or was given under another name, or told already."""
    keys = problem.keys
    return problem.kind == "missing" and any(
        other.meant == keys or (other is not problem and other.keys[: len(keys)] == keys) for other in told
    )
