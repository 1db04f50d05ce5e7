"""The pages in docs/config are what the sections' classes say."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from config_reference import COMMAND, main, pages, stale, write

from ds_core import registry
from ds_core.config.catalog import all_sections
from ds_core.config.config import Config
from ds_core.config.paths import sections_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def fresh() -> dict[str, str]:
    return pages()


def test_the_pages_are_what_the_classes_say() -> None:
    assert stale() == [], f"a class changed and its page did not: run `{COMMAND}` and commit docs/config"


def test_the_same_every_time(fresh: dict[str, str]) -> None:
    assert pages() == fresh


def test_every_key_is_on_the_page_of_its_section(fresh: dict[str, str]) -> None:
    for name, model in all_sections().items():
        for key in model.fields_by_key():
            assert f"`{key}`" in fresh[f"{name}.md"]
    plain = Config.model_fields.keys() - sections_of(Config).keys()
    assert [key for key in plain if f"| `{key}`" not in fresh["top-level.md"]] == []


def test_options_of_this_repositorys_engines_are_on_the_page(fresh: dict[str, str]) -> None:
    for name in ("checkpoint", "partition", "precision"):
        for plugin in registry.installed(name):
            taken = plugin.load().Config
            if taken is not None and plugin.package in ("ds-core", "ds-ckpt", "ds-fp16"):
                _, _, part = fresh[f"{name}.md"].partition(f"## `{name}.{plugin.name}`\n")
                part = part.partition("\n## ")[0]
                assert "The same keys as" in part or all(f"| `{key}`" in part for key in taken.model_fields), plugin
    assert "| `keep_last` |" in fresh["checkpoint.md"]


def test_every_page_is_in_the_index(fresh: dict[str, str]) -> None:
    linked = set(re.findall(r"\]\((\S+\.md)\)", fresh["README.md"]))
    assert linked == fresh.keys() - {"README.md"}


def test_tables_are_whole(fresh: dict[str, str]) -> None:
    for name, text in fresh.items():
        width = 0
        for line in text.splitlines():
            if not line.startswith("|"):
                width = 0
                continue
            cells = len(re.findall(r"(?<!\\)\|", line)) - 1
            assert width in (0, cells), f"{name}: {line}"
            width = cells


def test_a_page_that_differs_is_found_and_written(tmp_path: Path, fresh: dict[str, str]) -> None:
    assert write(tmp_path) == sorted(fresh)
    (tmp_path / "fp16.md").write_text("old", encoding="utf-8")
    (tmp_path / "bf16.md").unlink()
    (tmp_path / "gone.md").write_text("a section that is no more", encoding="utf-8")
    assert stale(tmp_path) == ["bf16.md", "fp16.md", "gone.md"]
    assert write(tmp_path) == ["bf16.md", "fp16.md", "gone.md"]
    assert stale(tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == set(fresh)


def test_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], fresh: dict[str, str]) -> None:
    assert main([], folder=tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"run: {COMMAND}"
    assert len(lines) == len(fresh) + 1
    assert main(["--write"], folder=tmp_path) == 0
    assert main([], folder=tmp_path) == 0
