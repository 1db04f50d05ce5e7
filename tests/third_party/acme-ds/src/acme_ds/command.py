"""``ds acme``: a subcommand of our own."""

from __future__ import annotations

import typer

app = typer.Typer()


@app.command()
def drop(anvils: int = typer.Option(1, help="How many.")) -> None:
    """Drop anvils."""
    typer.echo(f"dropped {anvils}")
