"""``ds`` itself: finds its subcommands in the registry, imports the one that is asked for, and prints errors."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperGroup

import ds_core
from ds_core import registry
from ds_core._packages import PACKAGE_OF_PLUGIN
from ds_core.errors import DsError, PluginError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["cli_main"]


class Subcommands(TyperGroup):
    """The subcommands of ``ds``: one per plugin of seam ``cli``, imported when it is run or when help lists it."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(registry.names("cli"))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command, one that raises the plugin's error if it cannot be loaded, or None if there is none."""
        if cmd_name not in registry.names("cli"):
            return None
        command = _load(cmd_name)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in registry.names("cli"):
            raise _unknown(args[0])
        return super().resolve_command(ctx, args)


root = typer.Typer(
    cls=Subcommands,
    # Completion would write to the home directory.
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ds-core {ds_core.__version__}")
        raise typer.Exit


@root.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version of ds-core and exit."
    ),
) -> None:
    """DeepSpeed's training runtime as small packages. `ds SUBCOMMAND --help` tells more."""


def cli_main(args: Sequence[str] | None = None) -> NoReturn:
    """Run ``ds`` with ``args`` (default: the process's) and exit: 0, 1 after an error, 2 for wrong usage.

    A :class:`~ds_core.errors.DsError` is printed to stderr without a traceback; any other
    exception is a bug and keeps it.
    """
    command = typer.main.get_command(root)
    try:
        command.main(args=None if args is None else list(args), prog_name="ds")
    except DsError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def _load(name: str) -> Any:
    try:
        app = registry.load("cli", name)
        if not isinstance(app, typer.Typer):
            raise PluginError(
                f"subcommand {name!r} is a {type(app).__name__}, expected a typer.Typer",
                where=registry.find("cli", name).entry.value,
                fix="report it to the authors of the package",
            )
        return typer.main.get_command(app)
    except Exception as error:
        # One broken plugin must not take `ds` down: help shows this error, running the subcommand raises it.
        return _broken(name, error)


def _broken(name: str, error: Exception) -> Any:
    """Return a command that stands for a plugin that cannot be loaded: help shows why, running it raises why."""
    app = typer.Typer(add_completion=False)
    what = error.what if isinstance(error, DsError) else f"{type(error).__name__}: {error}"

    @app.command(
        help=f"Cannot be used. {what}",
        short_help=f"cannot be used: {what}",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def fail() -> None:
        if isinstance(error, DsError):
            raise error
        raise PluginError(
            f"subcommand {name!r} cannot be imported: {what}",
            where=registry.find("cli", name).entry.value,
            fix="update or reinstall the package that brings it, or report it to its authors",
        ) from error

    return typer.main.get_command(app)


def _unknown(name: str) -> DsError:
    if ("cli", name) in PACKAGE_OF_PLUGIN:
        try:
            registry.find("cli", name, needed_by=f"ds {name}")
        except DsError as error:
            return error
    known = {*registry.names("cli"), *(word for seam, word in PACKAGE_OF_PLUGIN if seam == "cli")}
    close = nearest(name, sorted(known))
    return PluginError(
        f"ds has no subcommand {name!r}",
        where=f"installed: {', '.join(registry.names('cli')) or 'none'}",
        fix=f"did you mean 'ds {close}'?" if close else "`ds --help` lists what there is",
    )
