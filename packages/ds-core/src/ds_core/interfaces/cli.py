"""Seam ``cli``: a subcommand of ``ds``. The entry name is the subcommand, the entry a ``typer.Typer`` application.

The module must import without torch (a test runs ``ds --help`` under an audit hook). An application with one command
is that subcommand; with several, they are its own subcommands. Errors are raised as ``DsError``: ``ds`` prints them
without a traceback and exits with 1. Contract: ``ds_core.testing.cli``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

    Subcommand = typer.Typer

__all__ = ["Subcommand"]
