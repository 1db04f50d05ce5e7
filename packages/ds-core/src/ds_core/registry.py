"""One lookup for every seam: the word a user writes is an entry-point name, the group is ``ds_core.<seam>``.

Built-ins register in ds-core's own ``pyproject.toml``, exactly as a stranger's plugin does in theirs. Nothing is
imported until it is asked for. Torch-free.
"""

from __future__ import annotations

import importlib.metadata as metadata
from dataclasses import dataclass
from functools import cache
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ds_core._packages import PACKAGE_OF_PLUGIN
from ds_core.errors import MissingPackageError, PluginError, nearest

__all__ = ["SEAMS", "Plugin", "find", "installed", "load", "names", "refresh", "version_here"]

SEAMS = (
    "precision",
    "partition",
    "optimizer",
    "scheduler",
    "checkpoint",
    "activation",
    "ops",
    "runner",
    "monitor",
    "accelerator",
    "engine",
    "config",
    "cli",
)
"""The seams of ds-core, in the order of docs/design/seams.md."""

CORE = "ds-core"


@dataclass(frozen=True)
class Plugin:
    """One installed entry point, not imported yet."""

    seam: str
    name: str
    package: str
    """The distribution that brings it, such as ``ds-fp16``."""
    version: str
    needs: str | None
    """The ``ds-core`` versions it was made for, as its package declares them (``~=0.1.0``), or None."""
    entry: metadata.EntryPoint

    def problem(self) -> str | None:
        """Return why this plugin cannot be used with the installed ds-core, or None."""
        if self.needs is None:
            return None
        have = metadata.version(CORE)
        if Requirement(CORE + self.needs).specifier.contains(have, prereleases=True):
            return None
        return f"{self.package} {self.version} is made for {CORE}{self.needs}, installed is {CORE} {have}"

    def load(self) -> Any:
        """Import and return what the entry names.

        Raises:
            PluginError: it was made for another ds-core, or its import fails.
        """
        where = f"entry point {self.name!r} of group 'ds_core.{self.seam}' in {self.package} {self.version}"
        problem = self.problem()
        if problem is not None:
            raise PluginError(problem, where=where, fix=f"pip install --upgrade {self.package} {CORE}")
        try:
            return self.entry.load()
        except (ImportError, AttributeError) as error:
            raise PluginError(
                f"the plugin cannot be imported: {error}",
                where=f"{where}: {self.entry.value}",
                fix=f"pip install --force-reinstall {self.package}, or report it to its authors",
            ) from error


def find(seam: str, name: str, *, needed_by: str | None = None, others: tuple[str, ...] = ()) -> Plugin:
    """Return the one plugin of ``seam`` called ``name``.

    Args:
        seam: one of :data:`SEAMS`.
        name: the word the user wrote; matched exactly.
        needed_by: the option that asks for it, such as ``"fp16.enabled"``; begins the error.
        others: further words the caller would accept, for the error's nearest match.

    Raises:
        MissingPackageError: no such plugin here, but a known package brings it, or a later release of it will.
        PluginError: no such plugin, or several packages register the name.
    """
    matches = [plugin for plugin in installed(seam) if plugin.name == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        owners = ", ".join(f"{plugin.package} {plugin.version}" for plugin in matches)
        raise PluginError(
            f"several packages register a 'ds_core.{seam}' plugin called {name!r}: {owners}",
            fix=f"uninstall all but one of {', '.join(sorted({plugin.package for plugin in matches}))}",
        )
    package = PACKAGE_OF_PLUGIN.get((seam, name))
    if package is not None:
        version = version_here(package)
        if version is not None:
            raise MissingPackageError(
                f'"{needed_by or f"{seam} {name}"}" comes with a later release of {package}, installed is {version}',
                where=f"installed 'ds_core.{seam}' plugins: {_listing(seam)}",
                fix=f"pip install --upgrade {package}, once there is one; until then choose one that is installed",
            )
        raise MissingPackageError(
            f'"{needed_by or f"{seam} {name}"}" needs {package}: pip install {package}',
            where=f"installed 'ds_core.{seam}' plugins: {_listing(seam)}",
            fix=f"pip install {package}",
        )
    close = nearest(name, (*names(seam), *others))
    raise PluginError(
        f"no 'ds_core.{seam}' plugin is called {name!r}" + (f" (asked for by {needed_by!r})" if needed_by else ""),
        where=f"installed: {_listing(seam)}",
        fix=f"did you mean {close!r}?" if close else "check the spelling, or install the package that provides it",
    )


def load(seam: str, name: str, *, needed_by: str | None = None) -> Any:
    """Import and return the plugin of ``seam`` called ``name``; see :func:`find` for the errors.

    >>> load("precision", "fp32").__name__
    'Fp32'
    """
    return find(seam, name, needed_by=needed_by).load()


def names(seam: str) -> tuple[str, ...]:
    """Return the names installed for ``seam``, sorted, each once.

    >>> "replicated" in names("partition")
    True
    """
    return tuple(sorted({plugin.name for plugin in installed(seam)}))


@cache
def installed(seam: str) -> tuple[Plugin, ...]:
    """Return every plugin of ``seam``, one per package and name, without importing any.

    Raises:
        PluginError: ``seam`` is not a seam of ds-core.
    """
    if seam not in SEAMS:
        raise PluginError(f"{seam!r} is not a seam", where="ds_core.registry", fix=f"one of {', '.join(SEAMS)}")
    found: dict[tuple[str, str], Plugin] = {}
    for entry in metadata.entry_points(group=f"ds_core.{seam}"):
        if entry.dist is None:
            continue
        package = canonicalize_name(entry.dist.name)
        # An editable install can be on the path twice; the first one is the one Python would import.
        found.setdefault(
            (package, entry.name),
            Plugin(seam, entry.name, package, entry.dist.version, _core_requirement(entry.dist), entry),
        )
    return tuple(sorted(found.values(), key=lambda plugin: (plugin.name, plugin.package)))


def version_here(package: str) -> str | None:
    """Return the version of a distribution that brings plugins; None where no plugin of it is installed.

    >>> version_here("ds-core") == metadata.version("ds-core")
    True
    """
    found = (plugin.version for seam in SEAMS for plugin in installed(seam) if plugin.package == package)
    return next(found, None)


def refresh() -> None:
    """Forget what was found, after packages were installed or removed in this process."""
    installed.cache_clear()


def _core_requirement(dist: metadata.Distribution) -> str | None:
    for line in dist.requires or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if canonicalize_name(requirement.name) == CORE and (
            requirement.marker is None or requirement.marker.evaluate()
        ):
            return str(requirement.specifier) or None
    return None


def _listing(seam: str) -> str:
    return ", ".join(names(seam)) or "none"
