from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


class Site:
    """A folder of distributions that a ``ds`` started here sees beside the installed ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def module(self, name: str, text: str) -> None:
        path = self.folder / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def distribution(
        self, name: str, entries: dict[str, str], *, seam: str = "cli", requires: str | None = None
    ) -> None:
        info = self.folder / f"{name.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        requirement = f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n{requirement}")
        lines = [f"[ds_core.{seam}]", *(f"{word} = {target}" for word, target in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))

    def ds(self, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
        """Run ``ds arguments`` in a process of its own; ``before`` is Python that runs first."""
        code = f"{before}\nfrom ds_core.cli import cli_main; cli_main()"
        path = os.pathsep.join([str(self.folder), *(entry for entry in sys.path if entry)])
        env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
        )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)
