"""Write the skeleton of a new package under packages/: ``nox -s new -- ds-NAME ["what it does"]``.

Standard library only. The skeleton installs, passes its tests and plugs into nothing yet.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from string import Template

__all__ = ["NewPackageError", "create"]

ROOT = Path(__file__).resolve().parents[1]
NAME = re.compile(r"ds(-[a-z][a-z0-9]*)+")
FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "__init__.py": "src/{module}/__init__.py",
    "test_public_api.py": "tests/test_public_api.py",
}
"""Template in tools/template -> place in the package."""


class NewPackageError(Exception):
    """The package cannot be made; the message says why and what to do."""


def create(package: str, *, root: Path = ROOT, description: str | None = None) -> Path:
    """Write ``root/packages/<package>`` and return it.

    Args:
        package: the distribution's name, such as ``ds-zero``.
        root: the repository; its ds-core says which minor version the package is made for.
        description: one line for the package index, without a full stop.

    Raises:
        NewPackageError: the name is not of the form ``ds-word``, or there is such a folder.
    """
    if not NAME.fullmatch(package):
        raise NewPackageError(
            f"{package!r} is not a name for a package here\n"
            "  fix: use ds- and words of lower-case letters and digits joined by '-', such as ds-zero"
        )
    folder = root / "packages" / package
    if folder.exists():
        raise NewPackageError(f"packages/{package} exists already\n  fix: choose another name, or remove the folder")
    description = description or f"The {package.removeprefix('ds-')} part of the ds training runtime"
    if '"' in description or "\n" in description or "\\" in description:
        raise NewPackageError("the description must be one line without quotes and backslashes")
    module = package.replace("-", "_")
    words = {"package": package, "module": module, "description": description, "core_minor": _core_minor(root)}
    for template, place in FILES.items():
        text = Template((ROOT / "tools" / "template" / f"{template}.txt").read_text(encoding="utf-8"))
        target = folder / place.format(module=module)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.substitute(words), encoding="utf-8")
    (folder / "src" / module / "py.typed").touch()
    (folder / "LICENSE").write_bytes((root / "LICENSE").read_bytes())
    return folder


def _core_minor(root: Path) -> str:
    text = (root / "packages" / "ds-core" / "src" / "ds_core" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(\d+\.\d+)\.', text, re.MULTILINE)
    assert found is not None
    return found.group(1)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="nox -s new --", description="Write the skeleton of a new package.")
    parser.add_argument("package", help="its name, such as ds-zero")
    parser.add_argument("description", nargs="?", help="what it does, one line")
    chosen = parser.parse_args(arguments)
    try:
        folder = create(chosen.package, description=chosen.description)
    except NewPackageError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {folder.relative_to(ROOT)}; next: nox -s \"tests_alone(package='{chosen.package}')\"")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
