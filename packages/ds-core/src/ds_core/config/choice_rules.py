"""Rules of the sections that choose a plugin by name: words that look like a slip of a known one. Imports no plugin."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from ds_core._packages import PACKAGE_OF_PLUGIN
from ds_core.config.problems import Problem
from ds_core.config.section import show

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ds_core.config.config import Config
    from ds_core.config.sections.choices import ChoiceSection

__all__ = ["CHOICE_RULES", "CHOICES"]

CHOICES = {"checkpoint": "engine", "precision": "type", "partition": "type"}
"""Sections that choose a plugin -> the key that names it."""
SHORTEST = 5
"""Shorter names differ by one letter on purpose: fp6 is not a slip of fp16."""


def _chosen_name(section_name: str) -> Callable[[Config], Iterator[Problem]]:
    def rule(config: Config) -> Iterator[Problem]:
        section: ChoiceSection = getattr(config, section_name)
        name = section.chosen
        # A configuration is also checked where its plugins are not installed: only a slip is certainly wrong. Who gives
        # options under the same name, too, means it.
        if name is None or name in section.options:
            return
        known = _known(section)
        close = _slip(name, known) if name not in known else None
        if close is not None:
            yield Problem(
                (section_name, CHOICES[section_name]),
                f"got {show(name)}, and no plugin is called so",
                f'did you mean "{close}"?',
            )

    return rule


def _section_names(section_name: str) -> Callable[[Config], Iterator[Problem]]:
    def rule(config: Config) -> Iterator[Problem]:
        section: ChoiceSection = getattr(config, section_name)
        others = [name for name in section.options if name != section.chosen]
        known = _known(section) if others else set()
        words = {*known, *section.fields_by_key(), *filter(None, [section.chosen])}
        for name in others:
            close = _slip(name, words) if name not in known else None
            if close is not None:
                yield Problem((section_name, name), "no plugin is called so", f'did you mean "{close}"?')

    return rule


def _known(section: ChoiceSection) -> set[str]:
    from ds_core import registry  # slow to import, and few configurations need it

    return {*registry.names(section.seam), *(name for seam, name in PACKAGE_OF_PLUGIN if seam == section.seam)}


def _slip(name: str, words: Iterable[str]) -> str | None:
    """Return the word that ``name`` is a slip of, in any case; None where it may as well be another plugin's name."""
    if len(name) < SHORTEST:
        return None
    return next(iter(difflib.get_close_matches(name.lower(), sorted(words), n=1, cutoff=0.8)), None)


CHOICE_RULES = [
    *(({f"{name}.{key}"}, _chosen_name(name)) for name, key in CHOICES.items()),
    *(({name}, _section_names(name)) for name in CHOICES),
]
"""(keys and sections the rule reads, the rule)."""
