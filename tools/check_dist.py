"""Look through built wheels and sdists: ``python tools/check_dist.py dist``. Standard library only."""

from __future__ import annotations

import email
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

__all__ = ["problems", "sdist_problems", "wheel_problems"]


def wheel_problems(wheel: Path) -> list[str]:
    """Return what is wrong with a wheel, nothing where it is fit to upload."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name.split("/")[0] for name in names if name.split("/")[0].endswith(".dist-info"))
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    package = metadata["Name"].replace("-", "_")
    found = []
    if f"{package}/__init__.py" not in names:
        found.append(f"it has no {package}/__init__.py")
    if f"{package}/py.typed" not in names:
        found.append(f"it has no {package}/py.typed, so type checkers ignore its types")
    if f"{info}/licenses/LICENSE" not in names:
        found.append("it has no LICENSE")
    strays = sorted({name.split("/")[0] for name in names} - {package, info})
    if strays:
        found.append(f"it installs {', '.join(strays)} beside {package}")
    found += [f"it contains a test: {name}" for name in names if _is_test(name)]
    if not wheel.name.endswith("-py3-none-any.whl"):
        found.append("it is not pure Python: no compiler may be needed")
    if not metadata.get_payload():
        found.append("it has no description: the README is missing or empty")
    return found


def sdist_problems(sdist: Path) -> list[str]:
    """Return what is wrong with an sdist: it must hold all that a wheel is made from."""
    with tarfile.open(sdist) as archive:
        names = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in archive.getnames()}
    needed = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO")
    return [f"it has no {name}" for name in needed if name not in names]


def problems(folder: Path) -> list[str]:
    """Return the problems of everything in ``folder``, each with the file's name."""
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    found = [f"{path.name}: {problem}" for path in wheels for problem in wheel_problems(path)]
    found += [f"{path.name}: {problem}" for path in sdists for problem in sdist_problems(path)]
    versions = {"-".join(path.name.split("-")[:2]) for path in wheels} ^ {
        path.name[: -len(".tar.gz")] for path in sdists
    }
    found += [f"{name}: there is a wheel or an sdist, not both" for name in sorted(versions)]
    return found if wheels else [*found, f"no wheel in {folder}"]


def _is_test(name: str) -> bool:
    # A package's public testing module (ds_core/testing) belongs to it; tests do not.
    parts = PurePosixPath(name).parts
    return "tests" in parts or parts[-1].startswith("test_") or parts[-1] == "conftest.py"


def main() -> int:
    folder = Path(sys.argv[1])
    found = problems(folder)
    print("\n".join(found) or f"{len(list(folder.iterdir()))} files in {folder.name}/: nothing wrong")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
