"""Who may import whom, checked on the source text: nothing is imported, so a cycle cannot hide the report of itself.

Floors of ds-core, low to high: a module imports from its own floor and the floors under it. Imports inside functions
count; imports under ``if TYPE_CHECKING`` do not, except of the engine, which nothing may know.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["FLOORS", "Import", "floor_problems", "imports", "module_name", "plugin_problems", "source_files"]

FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "_packages", "log"}),
    frozenset({"registry"}),
    frozenset({"config", "elasticity"}),
    frozenset({"interfaces"}),
    frozenset(
        {
            "accelerator",
            "activation",
            "checkpoint",
            "checkpointing",
            "comm",
            "data",
            "monitor",
            "ops",
            "optim",
            "partition",
            "precision",
            "schedules",
        }
    ),
    frozenset({"engine"}),
    frozenset({"cli", "utils"}),
)
TESTING = "testing"
"""May import every floor; no floor may import it."""


@dataclass(frozen=True)
class Import:
    """One name that a line imports, absolute: ``ds_core.comm`` or ``ds_core.comm.barrier``."""

    name: str
    line: int
    for_types: bool

    @property
    def root(self) -> str:
        return self.name.split(".", 1)[0]


def source_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def module_name(path: Path, src: Path) -> str:
    """Return the dotted name of ``path`` under the source root ``src``; a package's is that of its folder."""
    parts = list(path.relative_to(src).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, src: Path) -> list[Import]:
    """Return everything ``path`` imports, at its top or inside functions, relative imports resolved."""
    package = module_name(path, src) if path.name == "__init__.py" else module_name(path, src).rpartition(".")[0]
    return list(_walk(ast.parse(path.read_text(), filename=str(path)), package, for_types=False))


def _walk(node: ast.AST, package: str, *, for_types: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, for_types) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, base] if base else above)
        # The imported name may itself be a module: `from ds_core import engine` imports the engine.
        yield from (Import(f"{base}.{alias.name}", node.lineno, for_types) for alias in node.names)
    elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for child in node.body:
            yield from _walk(child, package, for_types=True)
        for child in node.orelse:
            yield from _walk(child, package, for_types=for_types)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _walk(child, package, for_types=for_types)


def floor_problems(src: Path, root: str = "ds_core") -> list[str]:
    """Return every import of package ``root`` that goes up a floor, and every module that stands on none."""
    height = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    found = []
    for path in source_files(src / root):
        parts = module_name(path, src).split(".")
        if len(parts) == 1 or parts[1] == TESTING:
            # The root's own names are lazy: its module must import nothing but errors and its table.
            allowed = height["errors"] if len(parts) == 1 else len(FLOORS)
        elif parts[1] in height:
            allowed = height[parts[1]]
        else:
            found.append(f"{'.'.join(parts)} stands on no floor: add {parts[1]!r} to tools/layers.py")
            continue
        for one in imports(path, src):
            target = one.name.split(".")
            if target[0] != root or len(target) == 1:
                continue
            where = f"{'.'.join(parts)}:{one.line} imports {one.name}"
            if target[1] == TESTING:
                if parts[1:2] != [TESTING]:
                    found.append(f"{where}: only tests import {TESTING}")
            elif target[1] in height:
                if height[target[1]] > allowed and (not one.for_types or target[1] == "engine"):
                    found.append(f"{where}, a higher floor")
            elif not target[1].startswith("__") and len(parts) > 1 and parts[1] != TESTING:
                found.append(f"{where}: inside {root} a name is imported from the module that has it")
    return found


def plugin_problems(src: Path, root: str, packages: Iterable[str]) -> list[str]:
    """Return every import of another plugin in the plugin ``root``; ``packages`` are all import names we own."""
    others = set(packages) - {root, "ds_core"}
    return [
        f"{module_name(path, src)}:{one.line} imports {one.name}: a plugin knows ds_core alone"
        for path in source_files(src / root)
        for one in imports(path, src)
        if one.root in others
    ]
