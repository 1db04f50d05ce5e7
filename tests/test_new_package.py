"""``nox -s new``: the skeleton of a package installs and passes its own tests; bad names are refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from new_package import NewPackageError, create

ROOT = Path(__file__).parents[1]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What ``create`` reads of a repository, elsewhere."""
    core = Path("packages/ds-core/src/ds_core/__init__.py")
    (tmp_path / core).parent.mkdir(parents=True)
    shutil.copy(ROOT / core, tmp_path / core)
    shutil.copy(ROOT / "LICENSE", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["zero", "ds-", "ds_zero", "ds-Zero", "ds-zero-", "ds--zero", "../ds-zero", "ds-3d", ""]
)
def test_a_bad_name_is_refused(copy: Path, name: str) -> None:
    with pytest.raises(NewPackageError, match=r"not a name .*\n.*such as ds-zero"):
        create(name, root=copy)
    assert sorted(path.name for path in (copy / "packages").iterdir()) == ["ds-core"]


def test_an_existing_folder_is_left_alone(copy: Path) -> None:
    (copy / "packages" / "ds-mine").mkdir()
    with pytest.raises(NewPackageError, match="packages/ds-mine exists already"):
        create("ds-mine", root=copy)
    assert list((copy / "packages" / "ds-mine").iterdir()) == []


def test_a_description_that_would_break_the_metadata_is_refused(copy: Path) -> None:
    with pytest.raises(NewPackageError, match="one line"):
        create("ds-mine", root=copy, description='the "best"')


def test_the_command_says_what_is_wrong_and_fails() -> None:
    command = [sys.executable, str(ROOT / "tools" / "new_package.py"), "ds-core"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "packages/ds-core exists already" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_new_package_installs_and_passes_its_tests(copy: Path) -> None:
    folder = create("ds-two-words", root=copy, description="Nothing yet")
    assert not list(folder.rglob("*.txt"))
    site = copy / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(folder)], timeout=120, check=True)
    assert (site / "ds_two_words" / "py.typed").is_file()
    assert list(site.glob("ds_two_words-0.1.0.dist-info/licenses/LICENSE"))
    assert not (site / "tests").exists()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--doctest-modules", str(folder / "tests"), str(site / "ds_two_words")],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


def test_a_new_package_is_clean(copy: Path) -> None:
    folder = create("ds-clean", root=copy)
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "check", "--quiet", str(folder)], timeout=60, check=True, cwd=copy)
    subprocess.run([*ruff, "format", "--check", "--quiet", str(folder)], timeout=60, check=True, cwd=copy)
    left = [path.name for path in folder.rglob("*") if path.is_file() and "$" in path.read_text()]
    assert left == []
