"""What the chosen plugins make of a configuration, as far as it can be said without torch; for ``ds config``.

Their classes are asked what ``initialize`` asks: for their options, and partitions for what they refuse.

``initialize`` looks plugins up anyway and raises what is wrong; rules and ``load_config`` import none of them.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

from ds_core.config.choice_rules import CHOICES
from ds_core.config.effects import unread_options
from ds_core.config.notes import Note, needs
from ds_core.config.problems import Problem, in_order, placed
from ds_core.config.section import show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ds_core.config.config import Config
    from ds_core.config.loading import Examined
    from ds_core.errors import ConfigError
    from ds_core.registry import Plugin

__all__ = ["with_plugins"]


def with_plugins(examined: Examined) -> tuple[Examined, list[Note]]:
    """Return ``examined`` with the problems that the chosen plugins find too, and what could not be said of them."""
    wrong = {problem.keys[0] for problem in examined.problems if problem.keys}
    found: list[Problem | Note] = []
    for section, key in CHOICES.items():
        if section not in wrong:  # what has a problem may be left out of the configuration
            found += _of_choice(examined.config, section, key)
    if not wrong & {"partition", "zero_optimization"}:
        found += _of_partition(examined.config)
    found = list(dict.fromkeys(found))  # a plugin that cannot be imported is told once
    renamed = {row.new: row.old for row in examined.renamed if row.new is not None}
    problems = [placed(each, examined.document, renamed) for each in found if isinstance(each, Problem)]
    notes = [each for each in found if isinstance(each, Note)]
    notes += [Note("unread", path, text) for path, text in unread_options(examined.config)]
    return replace(examined, problems=tuple(in_order([*examined.problems, *problems], examined.document))), notes


def _of_choice(config: Config, section: str, key: str) -> Iterator[Problem | Note]:
    from ds_core import registry  # slow to import
    from ds_core._packages import PACKAGE_OF_PLUGIN

    chooser = getattr(config, section)
    name, given = config.plugin(section), bool(chooser.options.get(config.plugin(section)))
    if chooser.chosen is None and not given:
        return
    by = getattr(chooser, "chosen_by", None) or f"{section}.{key}"
    unchecked = f"; the options in {section}.{name} are unchecked" if given else ""
    if name not in registry.names(section):
        package = PACKAGE_OF_PLUGIN.get((section, name))
        nobody = f"needs a package that brings the {section} {show(name)}, and none is installed here"
        what = needs(package, registry.version_here(package)) if package else nobody
        yield Note("package", by, f"initialize {what}{unchecked}")
    elif given:
        found = _class_of(section, name, by, Note("unchecked", f"{section}.{name}", "initialize checks them"))
        if isinstance(found, (Problem, Note)):
            yield found
        else:
            yield from config.checked_options(section, name, found.Config)[1]


def _of_partition(config: Config) -> Iterator[Problem | Note]:
    """Yield what the partition in force refuses of a configuration that is valid by itself."""
    from ds_core import registry
    from ds_core.errors import ConfigError

    name = config.plugin("partition")
    by = "partition.type" if config.partition.chosen else "zero_optimization.stage"
    # The core's own refuses nothing, and a package that is missing is told elsewhere.
    if name == "replicated" or name not in registry.names("partition"):
        return
    found = _class_of("partition", name, by, Note("unchecked", by, "initialize asks it what it refuses"))
    if isinstance(found, (Problem, Note)):
        yield found
    else:
        try:
            found.check_config(config)
        except ConfigError as error:
            yield _as_problem(error, by, config)


def _as_problem(error: ConfigError, by: str, config: Config) -> Problem:
    """Return what a plugin raised as a problem of the key that its text begins with, else of the key ``by``."""
    path, colon, text = error.what.partition(": ")
    keys = tuple(path.split("."))
    if colon and keys[0] in config.sections:
        return Problem(keys, text, error.fix)
    return Problem(tuple(by.split(".")), error.what, error.fix)


def _class_of(section: str, name: str, by: str, unchecked: Note) -> Any:
    """Return the class of an installed plugin; ``unchecked`` where that needs torch; or the problem of a broken one."""
    from ds_core import registry
    from ds_core.errors import PluginError

    try:
        plugin = registry.find(section, name, needed_by=by)
        found = _loaded_without_torch(plugin)
    except PluginError as error:
        return Problem(tuple(by.split(".")), error.what, error.fix)
    if found is None:
        return replace(unchecked, text=f"unchecked: asking {plugin.package} needs torch; {unchecked.text}")
    return found


class _NeedsTorchError(Exception):
    """No ImportError: a module that can do without torch would go on, and be another one for the whole process."""


class _WithoutTorch(MetaPathFinder):
    """Refuses torch to the thread that made it."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "torch" and threading.get_ident() == self._thread:
            raise _NeedsTorchError


def _loaded_without_torch(plugin: Plugin) -> Any:
    """Import and return what ``plugin`` names; None if that would import torch, which takes seconds or is missing."""
    if "torch" in sys.modules:
        return plugin.load()
    finder = _WithoutTorch()
    sys.meta_path.insert(0, finder)
    try:
        return plugin.load()
    except _NeedsTorchError:
        return None
    finally:
        sys.meta_path.remove(finder)
