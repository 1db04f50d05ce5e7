"""What to know about a configuration beside its values; the last part of ``ds config explain``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ds_core.config.effects import without_effect
from ds_core.config.paths import dotted, is_open
from ds_core.config.section import show
from ds_core.config.sections.choices import PLAIN, SHARDED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ds_core.config.config import Config
    from ds_core.config.explain import Group
    from ds_core.config.loading import Examined
    from ds_core.config.origins import Origins

__all__ = ["Note", "needs", "notes_of", "of_later_releases"]


@dataclass(frozen=True)
class Note:
    """One thing to know."""

    kind: Literal["deprecated", "ignored", "no effect", "hint", "package", "unchecked", "unread"]
    """Its kind."""
    path: str
    """Dotted path of the key it is about, empty where it is about none."""
    text: str
    """The rest of the sentence that begins with the path, or a sentence."""

    def __str__(self) -> str:
        return f"{self.path}: {self.text}" if self.path else self.text


def notes_of(examined: Examined, origins: Origins, groups: Sequence[Group]) -> Iterator[Note]:
    """Yield the notes about ``examined``, whose values are in ``groups``."""
    config, document = examined.config, examined.document
    for row in examined.renamed:
        place = document.position(row.old)
        at = "" if place is None else f" (line {place[0]})"
        yield Note("deprecated", dotted(row.old), f"deprecated{at}, {row.text}")
    for problem in examined.warnings:
        at = "" if problem.place is None else f" (line {problem.place[0]})"
        yield Note("ignored", problem.path, f"ignored in compatibility mode{at}: {problem.text}")
    # The heading of a section that is off says it for all its keys.
    quiet = {group.name for group in groups if group.state}
    for path, why in without_effect(config).items():
        if path not in config.ignored and path.partition(".")[0] not in quiet:
            yield Note("no effect", path, why)
    yield from _hints(config, groups)
    for needed_by, package, version in _missing_packages(config):
        yield Note("package", needed_by, f"initialize {needs(package, version)}")


def needs(package: str, version: str | None) -> str:
    """Say that ``package`` is needed, or a later release of it where ``version`` is installed."""
    if version is None:
        return f"needs {package}, which is not installed: pip install {package}"
    return f"needs a later release of {package}, installed is {version}"


def of_later_releases(config: Config) -> Iterator[Note]:
    """Yield what an installed package is said to bring, and does not: ``initialize`` will refuse it on this machine."""
    for needed_by, package, version in _missing_packages(config):
        if version is not None:
            yield Note("package", needed_by, f"initialize {needs(package, version)}")


def _hints(config: Config, groups: Sequence[Group]) -> Iterator[Note]:
    autos = [
        setting.path
        for group in groups
        for setting in group.settings
        if setting.kind == "open" and is_open(setting.value) and not group.state
    ]
    if autos:
        what = '"auto" is left here; write values, or let the client that calls initialize fill them in'
        yield Note("hint", ", ".join(autos), what)
    if config.scheduler is not None and config.optimizer is None:
        yield Note("hint", "", "a scheduler is configured and no optimizer: pass optimizer= to initialize")
    clip = next(setting for setting in groups[0].settings if setting.path == "gradient_clipping")
    if clip.kind == "default":
        yield Note("hint", "", f"gradients are clipped at norm {clip.value}, the default; gradient_clipping sets it")
    engines = [s for group in groups for s in group.settings if s.path == "checkpoint.engine" and s.kind == "default"]
    if engines:
        yield Note(
            "hint",
            "checkpoint.engine",
            f"left out, it is {show(SHARDED)} where ds-ckpt is installed, else {show(PLAIN)}",
        )


def _missing_packages(config: Config) -> Iterator[tuple[str, str, str | None]]:
    """Yield what names a plugin of a known package that is not here, the package, and its version if it is here."""
    from ds_core import registry  # slow to import
    from ds_core._packages import PACKAGE_OF_PLUGIN

    for seam, name, needed_by in _plugins(config):
        package = PACKAGE_OF_PLUGIN.get((seam, name))
        if package is not None and name not in registry.names(seam):
            yield needed_by, package, registry.version_here(package)


def _plugins(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield the plugins that ``initialize`` will look up: seam, name, and the key that asks for it."""
    precision = config.plugin("precision")
    yield "precision", precision, "precision.type" if config.precision.chosen else f"{precision}.enabled"
    partition = config.plugin("partition")
    yield "partition", partition, "partition.type" if config.partition.chosen else "zero_optimization.stage"
    yield "checkpoint", config.plugin("checkpoint"), config.checkpoint.chosen_by or "checkpoint.engine"
    activation = config.sections.get("activation_checkpointing")
    if activation is not None and getattr(activation, "policy", None) is not None:
        yield "activation", "deepspeed", "activation_checkpointing.policy"
    if config.optimizer is not None:
        yield "optimizer", config.optimizer.type.lower(), "optimizer.type"
