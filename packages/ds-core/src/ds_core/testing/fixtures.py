"""Fixtures for tests that build engines in the test process. Importing one into a test module is using it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ds_core.testing.state import reset_globals

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["one_process"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the test be a job of one rank, whatever started it, and leave no process-wide state behind."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    reset_globals()
    yield
    reset_globals()
