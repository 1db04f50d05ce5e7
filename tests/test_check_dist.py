"""The look through wheels and sdists finds what must not be uploaded."""

from __future__ import annotations

import tarfile
import zipfile
from typing import TYPE_CHECKING

import pytest
from check_dist import problems

if TYPE_CHECKING:
    from pathlib import Path

GOOD = {
    "ds_one/__init__.py": "",
    "ds_one/py.typed": "",
    "ds_one/testing/contract.py": "",
    "ds_one-0.1.0.dist-info/METADATA": "Name: ds-one\n\nAbout it",
    "ds_one-0.1.0.dist-info/licenses/LICENSE": "",
}
SDIST = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO")


def dist(folder: Path, files: dict[str, str], *, tag: str = "py3-none-any", sdist: tuple[str, ...] = SDIST) -> Path:
    with zipfile.ZipFile(folder / f"ds_one-0.1.0-{tag}.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    with tarfile.open(folder / "ds_one-0.1.0.tar.gz", "w:gz") as archive:
        for name in sdist:
            archive.addfile(tarfile.TarInfo(f"ds_one-0.1.0/{name}"))
    return folder


def test_a_good_one_has_no_problems(tmp_path: Path) -> None:
    assert problems(dist(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ds_one/py.typed": None}, "py.typed"),
        ({"ds_one/__init__.py": None}, "ds_one/__init__.py"),
        ({"ds_one-0.1.0.dist-info/licenses/LICENSE": None}, "LICENSE"),
        ({"tests/test_a.py": ""}, "installs tests beside ds_one"),
        ({"ds_one/tests/a.py": ""}, "contains a test: ds_one/tests/a.py"),
        ({"ds_one/test_a.py": ""}, "contains a test: ds_one/test_a.py"),
        ({"ds_one-0.1.0.dist-info/METADATA": "Name: ds-one\n\n"}, "no description"),
    ],
)
def test_a_bad_wheel_is_found(tmp_path: Path, change: dict[str, str | None], complaint: str) -> None:
    files = {name: text for name, text in {**GOOD, **change}.items() if text is not None}
    assert complaint in "\n".join(problems(dist(tmp_path, files)))


def test_a_wheel_for_one_machine_is_found(tmp_path: Path) -> None:
    assert "not pure Python" in "\n".join(problems(dist(tmp_path, GOOD, tag="cp311-cp311-linux_x86_64")))


def test_an_incomplete_sdist_is_found(tmp_path: Path) -> None:
    assert problems(dist(tmp_path, GOOD, sdist=SDIST[1:])) == ["ds_one-0.1.0.tar.gz: it has no pyproject.toml"]


def test_a_missing_half_is_found(tmp_path: Path) -> None:
    (dist(tmp_path, GOOD) / "ds_one-0.1.0.tar.gz").unlink()
    assert problems(tmp_path) == ["ds_one-0.1.0: there is a wheel or an sdist, not both"]


def test_an_empty_folder_is_a_problem(tmp_path: Path) -> None:
    assert problems(tmp_path) == [f"no wheel in {tmp_path}"]
