"""Contract of the seam ``cli``; inherit :class:`SubcommandContract` in a plugin's tests."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import typer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["SubcommandContract"]


class SubcommandContract:
    """What every subcommand of ``ds`` promises. It is tested as installed, by its entry point."""

    @pytest.fixture
    def name(self) -> str:
        """Override: the subcommand's word."""
        raise NotImplementedError

    @pytest.fixture
    def entry(self) -> str:
        """Override: what the entry point names, ``module:attribute``."""
        raise NotImplementedError

    @pytest.fixture
    def failing(self) -> Sequence[str] | None:
        """Override if there are any: arguments that make it raise a ``DsError``."""
        return None

    def test_the_entry_is_an_application(self, entry: str) -> None:
        module, _, attribute = entry.partition(":")
        assert isinstance(getattr(importlib.import_module(module), attribute), typer.Typer)

    def test_it_imports_without_torch_and_output(self, entry: str, tmp_path: Path) -> None:
        code = f"import {entry.partition(':')[0]}, sys; assert 'torch' not in sys.modules, 'torch was imported'"
        done = _python(["-c", code], tmp_path)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert list(tmp_path.iterdir()) == []

    def test_ds_lists_it(self, name: str, tmp_path: Path) -> None:
        done = _ds(["--help"], tmp_path)
        assert done.returncode == 0, done.stderr
        assert name in done.stdout.split()

    def test_it_explains_itself(self, name: str, tmp_path: Path) -> None:
        done = _ds([name, "--help"], tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"ds {name}" in done.stdout
        assert list(tmp_path.iterdir()) == [], "nothing is written, the home directory included"

    def test_wrong_usage_exits_with_2(self, name: str, tmp_path: Path) -> None:
        done = _ds([name, "--surely-no-such-option"], tmp_path)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "--surely-no-such-option" in done.stderr
        assert "Traceback" not in done.stderr

    def test_an_error_has_no_traceback(self, name: str, failing: Sequence[str] | None, tmp_path: Path) -> None:
        if failing is None:
            pytest.skip(f"no arguments make 'ds {name}' fail")
        done = _ds([name, *failing], tmp_path)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "fix:" in done.stderr
        assert "Traceback" not in done.stderr


def _ds(arguments: Sequence[str], home: Path) -> subprocess.CompletedProcess[str]:
    return _python(["-c", "from ds_core.cli import cli_main; cli_main()", *arguments], home)


def _python(arguments: Sequence[str], home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOME": str(home), "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
