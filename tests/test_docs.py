"""Examples run: those in docstrings of every module, and the marked blocks of the Markdown files."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from layers import module_name, source_files
from markdown_blocks import Block, blocks

from ds_core.testing.state import reset_globals

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
SOURCES = sorted(ROOT.glob("packages/*/src"))
MODULES = [module_name(path, src) for src in SOURCES for path in source_files(src)]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("packages/*/*.md"), *ROOT.glob("docs/**/*.md")])
BLOCKS = [block for page in PAGES for block in blocks(page)]


def identify(block: Block) -> str:
    return f"{block.path.relative_to(ROOT)}:{block.line}"


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder; what the examples made that a process has one of is taken away afterwards."""
    monkeypatch.chdir(tmp_path)
    yield
    reset_globals()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0, f"python -m doctest shows the difference in {name}"


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    found = sum(len(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name)))
    assert found >= 10


@pytest.mark.parametrize("block", BLOCKS, ids=identify)
def test_marked_blocks(block: Block, tmp_path: Path) -> None:
    done = subprocess.run(
        [*block.command, block.code],
        cwd=tmp_path,
        # `python` and `ds` of the environment that runs the tests.
        env={**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{identify(block)}\n{done.stdout}{done.stderr}"


def test_a_block_without_its_mark_is_prose(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\n1/0\n```\ntext\n<!-- run -->\n```bash\nexit 0\nexit 1\n```\n")
    (block,) = blocks(page)
    assert (block.line, block.language, block.code) == (7, "bash", "exit 0\nexit 1\n")


def test_a_mark_without_a_block_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- run -->\n\n```python\n```\n")
    with pytest.raises(ValueError, match=r"page\.md:1: <!-- run --> needs a fence"):
        blocks(page)
