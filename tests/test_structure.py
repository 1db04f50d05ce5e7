"""The shape of the repository: who imports whom, what a package consists of, what its metadata says."""

from __future__ import annotations

import graphlib
import importlib
import json
import re
from pathlib import Path

import pytest
from layers import floor_problems, imports, plugin_problems, source_files

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings tomli there
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
IMPORT_NAMES = [path.name.replace("-", "_") for path in PACKAGES]
PARTS = ("packages", "tests", "tools", "benchmarks", "examples", "docs", ".ci")
GENERATED = {
    "__pycache__",
    ".hypothesis",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    "dist",
    "build",
    "runs",
    "results",
}

every_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)


def project(package: Path) -> dict:
    return tomllib.loads((package / "pyproject.toml").read_text())["project"]


def version_of(package: Path) -> str:
    init = package / "src" / package.name.replace("-", "_") / "__init__.py"
    return re.search(r'^__version__ = "(.+)"$', init.read_text(), re.MULTILINE).group(1)


def repository_files() -> list[Path]:
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for part in PARTS:
        found += [path for path in (ROOT / part).rglob("*") if path.is_file()]
    return [path for path in found if not GENERATED & set(path.relative_to(ROOT).parts)]


def write(folder: Path, **modules: str) -> Path:
    """Write ``a__b="text"`` as ``ds_core/a/b.py`` under ``folder``."""
    for name, text in modules.items():
        path = folder / "ds_core" / (name if name == "__init__" else name.replace("__", "/"))
        path = path.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_the_core_and_its_first_plugin_are_here() -> None:
    assert {"ds-core", "ds-launcher"} <= {package.name for package in PACKAGES}


def test_no_module_of_ds_core_imports_a_higher_floor() -> None:
    assert floor_problems(ROOT / "packages" / "ds-core" / "src") == []


@pytest.mark.parametrize(
    ("module", "text", "complaint"),
    [
        ("comm__x", "from ds_core.engine.engine import DeepSpeedEngine", "higher floor"),
        ("comm__x", "def f():\n    import ds_core.engine", "higher floor"),
        ("comm__x", "from ds_core import cli", "higher floor"),
        ("comm__x", "from ..cli import cli_main", "higher floor"),
        ("config__x", "from ds_core.interfaces.cli import Subcommand", "higher floor"),
        ("config__x", "from ds_core.comm import barrier", "higher floor"),
        ("engine__x", "from ds_core.testing.ranks import run_ranks", "only tests import testing"),
        ("comm__x", "if TYPE_CHECKING:\n    from ds_core.engine.engine import DeepSpeedEngine", "higher floor"),
        ("comm__x", "from ds_core import initialize", "from the module that has it"),
        ("novelty__x", "import torch", "stands on no floor"),
        ("__init__", "from ds_core.config import load_config", "higher floor"),
    ],
)
def test_an_import_upwards_is_found(tmp_path: Path, module: str, text: str, complaint: str) -> None:
    found = floor_problems(write(tmp_path, **{module: text}))
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("engine__x", "from ds_core.comm import barrier"),
        ("comm__x", "from ds_core.accelerator import get_accelerator"),
        ("interfaces__x", "if TYPE_CHECKING:\n    from ds_core.comm import Group"),
        ("testing__x", "from ds_core.engine.engine import DeepSpeedEngine"),
        ("log", "from ds_core import __version__"),
    ],
)
def test_an_import_downwards_is_not(tmp_path: Path, module: str, text: str) -> None:
    assert floor_problems(write(tmp_path, **{module: text})) == []


@every_package
def test_a_plugin_imports_no_other_plugin(package: Path) -> None:
    if package.name == "ds-core":
        # The core names plugins in strings, for its errors, and imports none.
        roots = {one.root for path in source_files(package / "src") for one in imports(path, package / "src")}
        assert not roots & set(IMPORT_NAMES) - {"ds_core"}
    else:
        assert plugin_problems(package / "src", package.name.replace("-", "_"), IMPORT_NAMES) == []


def test_an_import_of_another_plugin_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "ds_one"
    folder.mkdir()
    (folder / "a.py").write_text("from ds_core.errors import DsError\ndef f():\n    from ds_two.b import c\n")
    found = plugin_problems(tmp_path, "ds_one", ["ds_core", "ds_one", "ds_two"])
    assert found == ["ds_one.a:3 imports ds_two.b.c: a plugin knows ds_core alone"]


def test_distributions_need_each_other_in_one_direction() -> None:
    own = {package.name for package in PACKAGES}
    needs = {
        package.name: {re.match(r"[\w.-]+", line).group() for line in project(package)["dependencies"]} & own
        for package in PACKAGES
    }
    assert next(iter(graphlib.TopologicalSorter(needs).static_order())) == "ds-core"
    assert all(found <= {"ds-core"} for found in needs.values())


@every_package
def test_a_plugin_is_made_for_one_minor_of_ds_core(package: Path) -> None:
    core = ROOT / "packages" / "ds-core"
    if package == core:
        assert re.fullmatch(r"\d+\.\d+\.\d+", version_of(core))
        return
    minor = version_of(core).rpartition(".")[0]
    lines = [line for line in project(package)["dependencies"] if line.startswith("ds-core")]
    assert lines == [f"ds-core~={minor}.0"]


@every_package
def test_a_package_has_all_its_parts(package: Path) -> None:
    source = package / "src" / package.name.replace("-", "_")
    needed = [
        package / "README.md",
        package / "CHANGELOG.md",
        package / "LICENSE",
        package / "tests" / "test_public_api.py",
        source / "py.typed",
        source / "__init__.py",
    ]
    assert [str(path.relative_to(ROOT)) for path in needed if not path.is_file()] == []
    assert (package / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert project(package)["name"] == package.name
    assert project(package)["requires-python"] == ">=3.10"
    assert project(package)["license"] == "Apache-2.0"
    assert f"## {version_of(package)}" in (package / "CHANGELOG.md").read_text()


@every_package
def test_entry_points_resolve(package: Path) -> None:
    groups = dict(project(package).get("entry-points", {}))
    groups["console_scripts"] = project(package).get("scripts", {})
    missing = []
    for group, entries in groups.items():
        assert group == "console_scripts" or group.removeprefix("ds_core.") in _seams(), f"{group} is no seam"
        for name, value in entries.items():
            module, _, attribute = value.partition(":")
            if not hasattr(importlib.import_module(module), attribute):
                missing.append(f"{group} {name} = {value}")
    assert missing == []


def _seams() -> tuple[str, ...]:
    from ds_core.registry import SEAMS

    return SEAMS


def test_every_seam_has_its_interface_and_its_contract_suite() -> None:
    source = ROOT / "packages" / "ds-core" / "src" / "ds_core"
    missing = [
        f"{folder}/{seam}.py"
        for seam in _seams()
        for folder in ("interfaces", "testing")
        if not (source / folder / f"{seam}.py").is_file()
    ]
    assert missing == []


def test_no_source_file_is_over_800_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in repository_files()
        if path.suffix == ".py" and (lines := len(path.read_text().splitlines())) > 800
    }
    assert long == {}


def test_no_file_mentions_the_machine_it_was_written_on() -> None:
    # Absolute paths of a person's or a builder's machine; `/dev`, `/proc` and `/tmp` are everybody's.
    machine = re.compile(rb"(?<![\w.~-])/(?:home|root|Users|work)/[\w.]")
    found = [
        f"{path.relative_to(ROOT)}: {match.group()!r}"
        for path in repository_files()
        if (match := machine.search(path.read_bytes()))
    ]
    assert found == []


def test_constraints_keep_cuda_builds_of_torch_out() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert any(re.fullmatch(r"torch==\d+\.\d+\.\d+", line) for line in lines)


def test_json_files_parse() -> None:
    for path in repository_files():
        # Files that are wrong on purpose stand beside the message they get.
        if path.suffix == ".json" and not path.with_suffix(".txt").exists():
            json.loads(path.read_text())
