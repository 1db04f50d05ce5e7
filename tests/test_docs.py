"""Examples run: those in docstrings of every module, and the marked blocks of the Markdown files."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import volume_page
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


def test_one_command_writes_every_page_that_a_tool_writes() -> None:
    tools = [path.stem for path in (ROOT / "tools").glob("*.py") if '"--write"' in path.read_text(encoding="utf-8")]
    (listed,) = re.findall(r"^PAGE_TOOLS = \((.*)\)$", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(re.findall(r'"(\w+)"', listed)) == sorted(tools)
    for tool in tools:
        assert importlib.import_module(tool).COMMAND == "nox -s docs -- --write"


def test_the_table_of_volumes_is_written(tmp_path: Path) -> None:
    assert volume_page.main([]) == 0
    page = tmp_path / "volume.md"
    text = volume_page.PAGE.read_text(encoding="utf-8")
    page.write_text(text.replace("| 1 | 1 | gloo | fp32 | 3", "| 1 | 1 | gloo | fp32 | 7"), encoding="utf-8")
    assert volume_page.main([], page) == 1
    assert volume_page.main(["--write"], page) == 0
    assert page.read_text(encoding="utf-8") == text


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
