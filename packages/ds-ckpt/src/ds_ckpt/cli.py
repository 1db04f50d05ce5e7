"""``ds ckpt``: what checkpoints there are, what is in one, and whether it is what was written. Needs no torch."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import Progress
    from rich.table import Table

    from ds_ckpt.stored import Stored
    from ds_ckpt.verify import Damage
    from ds_core.errors import CheckpointError

__all__ = ["app"]

_NO_LIMIT = 10**5
"""Columns, where what is printed is not for a terminal: another program reads it by lines."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="List, show, verify, compare and export checkpoints: ours, and those that DeepSpeed wrote.",
)

_Directory = Annotated[str, typer.Argument(metavar="DIR", help="Folder that checkpoints were saved to, or a URL.")]
_TagName = Annotated[
    Optional[str],  # noqa: UP045 -- typer reads this at run time, on Python 3.10 too
    typer.Argument(metavar="[TAG]", help="Which; default: what `latest` names, or DIR itself if it is a checkpoint."),
]


_TagA = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--tag-a", help="Which of A; default: what `latest` names, or A itself if it is a checkpoint."),
]
_TagB = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--tag-b", help="Which of B."),
]


@app.command("ls")
def list_tags(directory: _Directory) -> None:
    """List the checkpoints in DIR, oldest first: step, size, ranks, format; or why one cannot be loaded."""
    from ds_ckpt.tables import tag_table
    from ds_ckpt.tags import find_tags, latest_problem

    tags = find_tags(directory)
    problem = latest_problem(directory, tags)
    _print(
        tag_table(tags) if tags else f"no checkpoint in {directory}",
        *([] if problem is None else [f"latest: {problem}"]),
    )


@app.command()
def show(
    directory: _Directory,
    tag: _TagName = None,
    depth: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--depth", min=0, help="Levels of modules. Default: as many as fit into 100 rows."),
    ] = None,
) -> None:
    """Show what a checkpoint holds: the bytes of each module's weights, masters and optimizer state."""
    from ds_ckpt.tables import facts, module_table

    stored = _read(directory, tag)
    _print(*(f"{name:>8}  {value}" for name, value in facts(stored)), module_table(stored, depth))


@app.command()
def verify(directory: _Directory, tag: _TagName = None) -> None:
    """Read every byte of a checkpoint and compare checksums; exit with 1 if one differs, naming file and tensor."""
    from ds_ckpt.tables import size_in_words
    from ds_ckpt.verify import find_damage

    stored = _read(directory, tag)
    total = sum(file.nbytes for file in stored.files.values())
    with _progress() as progress:
        task = progress.add_task("reading", total=total)
        damages = list(find_damage(stored, lambda count: progress.advance(task, count)))
    if damages:
        raise _error(stored, damages)
    amount = f"{len(stored.files)} file{'' if len(stored.files) == 1 else 's'}, {size_in_words(total)}"
    if all(file.checksum is not None for file in stored.files.values()):
        text = "all is as it was written"
    else:
        text = f"sizes and structure are right; {stored.format} has no checksums"
    _print(f"{stored.folder}: {amount}: {text}")


@app.command("export")
def export_weights(
    directory: _Directory,
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder to write to, made if missing.")],
    tag: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--tag", help="Which; default: what `latest` names, or DIR itself if it is a checkpoint."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="float32, bfloat16 or float16, or fp32, bf16, fp16; `stored`: what the model has."
        ),
    ] = "float32",
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Of a file, such as 500MB, or `none` for one file.")
    ] = "5GB",
    as_bin: Annotated[
        bool, typer.Option("--bin", help="Write pytorch_model.bin in place of safetensors. Needs torch.")
    ] = False,
    exclude_frozen: Annotated[
        bool, typer.Option("--exclude-frozen", help="Leave out the weights that are not trained.")
    ] = False,
) -> None:
    """Write the weights of a checkpoint as transformers loads them: model.safetensors, or shards with an index."""
    from ds_ckpt.exporting import export
    from ds_ckpt.tables import size_in_words

    with _progress() as progress:
        task = progress.add_task("exporting", total=None)
        done = export(
            directory,
            output,
            tag,
            dtype,
            max_shard_size,
            safe_serialization=not as_bin,
            exclude_frozen_parameters=exclude_frozen,
            progress=lambda count, total: progress.update(task, advance=count, total=total),
        )
    amount = f"{done.tensors} tensors, {size_in_words(done.nbytes)}"
    if done.shared:
        amount += f", {len(done.shared)} more name{'' if len(done.shared) == 1 else 's'} of them"
    if done.beyond:
        amount += f", {len(done.beyond)} with values that {dtype} cannot hold: infinite now"
    what = done.files[0] if done.index is None else f"{len(done.files)} files and {done.index}"
    _print(f"{amount}: {output}/{what}")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint: DIR, a URL, or either with `:TAG` behind it.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, in any format.")],
    tag_a: _TagA = None,
    tag_b: _TagB = None,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance", min=0.0, help="Numbers whose absolute or relative difference is at most this are equal."
        ),
    ] = 0.0,
    read: Annotated[bool, typer.Option("--read", help="Read what has equal checksums, too.")] = False,
    no_state: Annotated[
        bool, typer.Option("--no-state", help="Compare tensors alone: no counters, options or client state.")
    ] = False,
    all_rows: Annotated[bool, typer.Option("--all", help="Print every difference, not 100 of each kind.")] = False,
) -> None:
    """Show what differs between two checkpoints: tensors and state.

    Exit with 0 if they are equal, 1 if they differ, 2 if they cannot be compared.
    """
    from ds_core.errors import CheckpointError, DsError

    try:
        is_equal = _diff(
            _place(a, tag_a),
            _place(b, tag_b),
            tolerance=tolerance,
            read=read,
            with_state=not no_state,
            all_rows=all_rows,
        )
    except (DsError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        # 1 means that they differ, so what is printed for every error elsewhere is printed here.
        if isinstance(error, OSError):
            error = CheckpointError(f"cannot be read: {error.strerror or error}", where=error.filename)
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    raise typer.Exit(0 if is_equal else 1)


def _diff(
    a: tuple[str, str | None],
    b: tuple[str, str | None],
    *,
    tolerance: float,
    read: bool,
    with_state: bool,
    all_rows: bool,
) -> bool:
    """Print what differs between two checkpoints, each a folder and a tag, and return whether they are equal."""
    from ds_ckpt.diff import compare
    from ds_ckpt.tables import difference_tables, one_line, summary

    stored_a, stored_b = _read(*a), _read(*b)
    with _progress() as progress:
        task = progress.add_task("comparing", total=None)
        found = compare(
            stored_a,
            stored_b,
            tolerance=tolerance,
            read=read,
            with_state=with_state,
            progress=lambda count, total: progress.update(task, advance=count, total=total),
        )
    items: list[str | Table] = [f"A  {one_line(stored_a)}", f"B  {one_line(stored_b)}"]
    for table in difference_tables(found, **({"most_rows": None} if all_rows else {})):
        items += ["", table]
    _print(*items, "", summary(found))
    return found.is_empty


def _place(text: str, tag: str | None) -> tuple[str, str | None]:
    """Return the folder and the tag that an argument means: ``DIR``, or ``DIR:TAG`` where there is no such ``DIR``."""
    from pathlib import Path

    from ds_ckpt.storage import folder_at

    if tag is not None or Path(text).exists():
        return text, tag
    parts = text.split(":")
    splits = [(":".join(parts[:at]), ":".join(parts[at:])) for at in range(len(parts) - 1, 0, -1)]
    # What follows the colon of a URL's scheme has slashes.
    splits = [(directory, last) for directory, last in splits if directory and last and "/" not in last]
    if len(splits) > 1:
        # A tag may have colons, and so may a folder.
        splits = [split for split in splits if folder_at(split[0]).is_there()] or splits
    return splits[0] if splits else (text, None)


def _error(stored: Stored, damages: Sequence[Damage]) -> CheckpointError:
    from ds_ckpt.checks import damaged

    if len(damages) == 1:
        return damaged(f"a file is not what was written: {damages[0].what}", stored.folder, damages[0].file)
    lines = "".join(f"\n  {damage.file}: {damage.what}" for damage in damages)
    what = f"{len(damages)} of {len(stored.files)} files are not what was written:{lines}"
    return damaged(what, stored.folder)


def _read(directory: str, tag: str | None) -> Stored:
    from ds_ckpt import formats
    from ds_ckpt.tags import folder_of

    return formats.read(folder_of(directory, tag))


def _print(*items: str | Table) -> None:
    """Print lines, and tables that fold where the terminal ends.

    Raises:
        CheckpointError: it cannot be written.
    """
    from rich.console import Console

    from ds_ckpt.tables import least_width
    from ds_core.errors import CheckpointError

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A tag may have letters that the terminal has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console()
    is_narrow = console.is_terminal or "COLUMNS" in os.environ
    try:
        for item in items:
            if isinstance(item, str):
                # A path is copied from here, so it stays on one line.
                console.print(item, markup=False, highlight=False, soft_wrap=True)
            else:
                Console(width=max(console.width, least_width(item)) if is_narrow else _NO_LIMIT).print(item)
        sys.stdout.flush()
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        # What is left in the buffer would fail again when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise CheckpointError(
            f"the result cannot be printed: {error.strerror or error}",
            where="stdout",
            fix="make room where it is written to",
        ) from error


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    # On stderr, and gone at the end: the output is the result alone.
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
