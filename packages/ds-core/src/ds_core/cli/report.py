"""``ds report``: what is installed, what works, what is missing. Works without torch, and says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def report(
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as one JSON object.")] = False,
) -> None:
    """Show packages, plugins, torch and devices, and what is missing."""
    from ds_core.cli.facts import collect

    facts = collect()
    if as_json:
        import json

        typer.echo(json.dumps(facts, indent=2))
        return
    from rich.console import Console

    print_report(facts, Console())


def print_report(facts: dict[str, Any], console: Console) -> None:
    """Print ``facts`` of :func:`ds_core.cli.facts.collect` as tables."""
    for table in (_machine(facts), _packages(facts), _plugins(facts), _missing(facts)):
        if table.row_count:
            console.print(table)


def _machine(facts: dict[str, Any]) -> Table:
    table = _table("Machine", "what", "value")
    machine, torch = facts["machine"], facts["torch"]
    rows = [
        ("Python", f"{machine['python']} ({machine['executable']})"),
        ("system", machine["system"]),
        ("CPU cores", f"{machine['cpu_cores_usable']} usable of {machine['cpu_cores']}"),
        ("memory", _gib(machine["memory_bytes"])),
        ("torch", torch["problem"] or f"{torch['version']}, {'CUDA ' + torch['cuda'] if torch['cuda'] else 'no CUDA'}"),
    ]
    if torch["backends"]:
        states = (f"{name} {'yes' if is_there else 'no'}" for name, is_there in torch["backends"].items())
        rows.append(("backends", ", ".join(states)))
    accelerator = torch["accelerator"]
    if accelerator is not None and accelerator["problem"]:
        rows.append(("accelerator", accelerator["problem"]))
    elif accelerator is not None:
        rows.append(("accelerator", f"{accelerator['kind']}, communicates with {accelerator['backend']}"))
        rows.append(("dtypes", ", ".join(accelerator["dtypes"])))
        rows += [(f"device {device['name']}", _gib(device["memory_bytes"])) for device in accelerator["devices"]]
    for row in rows:
        _add(table, *row)
    return table


def _packages(facts: dict[str, Any]) -> Table:
    table = _table("Packages", "package", "version")
    for name, version in facts["packages"].items():
        _add(table, name, version)
    return table


def _plugins(facts: dict[str, Any]) -> Table:
    table = _table("Plugins", "seam", "name", "from", "state")
    for plugin in facts["plugins"]:
        origin = "built in" if plugin["built_in"] else f"{plugin['package']} {plugin['version']}"
        _add(table, plugin["seam"], plugin["name"], origin, plugin["problem"] or "ok", is_bad=bool(plugin["problem"]))
    return table


def _missing(facts: dict[str, Any]) -> Table:
    table = _table("Not installed", "package", "brings", "install")
    for entry in facts["missing"]:
        _add(table, entry["package"], ", ".join(entry["brings"]), entry["install"])
    return table


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        # Folded, never cut: a problem that ends in "..." helps nobody.
        table.add_column(column, overflow="fold")
    return table


def _add(table: Table, *cells: str, is_bad: bool = False) -> None:
    from rich.text import Text

    # Text, not markup: error messages contain square brackets.
    table.add_row(*(Text(cell) for cell in cells), style="red" if is_bad else None)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
