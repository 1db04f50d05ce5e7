"""The ``ds`` command. Its subcommands are the plugins of seam ``cli``; nothing here loads torch."""

from ds_core.cli.root import cli_main

__all__ = ["cli_main"]
