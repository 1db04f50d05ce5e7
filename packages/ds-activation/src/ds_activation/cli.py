"""``ds activation``: what a model keeps for backward, and what policies make of it. Imports torch only when run."""

from __future__ import annotations

import sys
from pathlib import Path  # noqa: TC003 -- typer reads it at run time
from typing import Annotated, List, Optional  # noqa: UP035 -- typer reads them at run time, on Python 3.10 too

import typer

__all__ = ["app"]

_NO_LIMIT = 10**5
"""Columns, where what is printed is not for a terminal: another program reads it by lines."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Show what a model keeps for backward, and what policies of activation checkpointing make of it.",
)


@app.callback()
def _activation() -> None:
    """Show what a model keeps for backward, and what policies of activation checkpointing make of it."""


@app.command()
def profile(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="FILE.py:FUNCTION or MODULE:FUNCTION; called without arguments, it returns (model, inputs): a tuple "
            "of positional inputs, a dict of keyword ones, or a single one.",
        ),
    ],
    modules: Annotated[
        Optional[List[str]],  # noqa: UP006, UP045
        typer.Option("--modules", "-m", help="Name, class name or pattern of the blocks. Default: the repeated ones."),
    ] = None,
    budget_mib: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--budget", min=0, help="MiB of saved activations that `auto` may keep. Default: several."),
    ] = None,
    png: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--png", help="Draw time and memory of the policies into this file; needs matplotlib."),
    ] = None,
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--device", help="Where to run, such as cuda or cpu. Default: where the model is."),
    ] = None,
) -> None:
    """Measure one forward; print the bytes each block saves, the time to compute it again, and what policies lead to.

    In that forward each block runs about five times. The model is in training
    mode and runs in its own dtype: without autocast, and without the precision
    that an engine would give it.
    """
    from rich.console import Console

    from ds_activation.curve import policies
    from ds_activation.plot import check_matplotlib, draw
    from ds_activation.report import block_table, policy_table

    if png is not None:
        check_matplotlib()
    # The console of a pipe would cut at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else _NO_LIMIT)
    with Console(stderr=True).status("one forward, each block measured"):
        found = _measured(target, modules or [], device)
    points = policies(found, None if budget_mib is None else round(budget_mib * 2**20))
    console.print(block_table(found))
    console.print(policy_table(points))
    if png is not None:
        draw(found, points, png)
        console.print(f"drawn: {png}")


def _measured(target: str, modules: list[str], device: str | None):  # type: ignore[no-untyped-def]  # torch-free here
    from torch.utils._pytree import tree_map_only

    from ds_activation.blocks import find_blocks
    from ds_activation.profile import profile as measure
    from ds_activation.target import load_target

    model, args, kwargs = load_target(target)
    blocks = find_blocks(model, modules)
    if device is not None:
        import torch

        model.to(device)
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (args, kwargs))
    return measure(model.train(), args, kwargs, blocks)
