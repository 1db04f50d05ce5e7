"""``ds run``: start a script once per rank on this machine and supervise it."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Optional

import typer

from ds_core.errors import LaunchError
from ds_launcher.spec import GRACE_S

__all__ = ["app"]

# No markup: the tables of rich cut the names of options at 80 columns.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(
    # Everything after the script is the script's own, words that look like our flags and "--" included.
    context_settings={"allow_interspersed_args": False, "allow_extra_args": True, "ignore_unknown_options": False},
    options_metavar="[FLAGS]",
)
def run(
    context: typer.Context,
    script: Annotated[
        str, typer.Argument(help="Script to run; what follows goes to it untouched.", metavar="SCRIPT [ARGS]...")
    ],
    nproc: Annotated[
        Optional[int],  # noqa: UP045 -- typer reads this at run time, on Python 3.10 too
        typer.Option(
            "--nproc",
            "--nproc-per-node",
            "--nproc_per_node",
            min=1,
            metavar="N",
            help="Ranks to start. Default: one per visible GPU, or one where there is none.",
        ),
    ] = None,
    num_gpus: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--num_gpus",
            "--num-gpus",
            "--num_accelerators",
            min=1,
            metavar="N",
            help="The same; an error where fewer GPUs are visible (but at least one is).",
        ),
    ] = None,
    master_addr: Annotated[
        str, typer.Option("--master_addr", "--master-addr", metavar="A", help="Address rank 0 is reached at.")
    ] = "127.0.0.1",
    master_port: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--master_port",
            "--master-port",
            min=1,
            max=65535,
            metavar="P",
            help="Port rank 0 listens on. Default: a free one.",
        ),
    ] = None,
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT is a module, as in `python -m`.")] = False,
    no_python: Annotated[
        bool, typer.Option("--no_python", "--no-python", help="SCRIPT is a program, run without Python.")
    ] = False,
    local_rank: Annotated[
        bool,
        typer.Option(
            "--local_rank/--no_local_rank",
            "--local-rank/--no-local-rank",
            help="Pass --local_rank=K as the script's first argument. The variable LOCAL_RANK is always set.",
        ),
    ] = False,
    grace: Annotated[
        float, typer.Option("--grace", min=0.0, metavar="S", help="Seconds between SIGTERM and SIGKILL.")
    ] = GRACE_S,
    log_dir: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--log-dir",
            "--log_dir",
            "--enable_each_rank_log",
            metavar="DIR",
            help="Also write each rank's output to DIR/rank_K.log.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "--dry_run", help="Print the command of each host; start nothing.")
    ] = False,
) -> None:
    """Start a script once per rank and supervise it."""
    from ds_core.interfaces.runner import Job
    from ds_launcher.local import LocalRunner

    prefix = _prefix(script, module=module, no_python=no_python)
    job = Job(
        command=[*prefix, script, *context.args],
        nproc=_nproc(nproc, num_gpus),
        master_addr=master_addr,
        master_port=master_port,
    )
    runner = LocalRunner(grace_s=grace, log_dir=log_dir, local_rank_at=len(prefix) + 1 if local_rank else None)
    if dry_run:
        for host, command in runner.commands(job).items():
            typer.echo(f"{host}: {shlex.join(command)}")
        return
    raise typer.Exit(runner.run(job))


def _nproc(nproc: int | None, num_gpus: int | None) -> int:
    from ds_launcher import resources

    if nproc is not None and num_gpus is not None and nproc != num_gpus:
        raise LaunchError(
            f"--nproc {nproc} and --num_gpus {num_gpus} both give the number of ranks", fix="leave one of them out"
        )
    gpus = resources.visible_gpus()
    if num_gpus is not None and 0 < gpus < num_gpus:
        raise LaunchError(
            f"--num_gpus {num_gpus} asks for more GPUs than the {gpus} that are visible",
            where="CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE_DEVICES" in os.environ else "/dev/nvidia*",
            fix=f"use --num_gpus {gpus}, or --nproc {num_gpus} to let ranks share a GPU",
        )
    return nproc or num_gpus or gpus or 1


def _prefix(script: str, *, module: bool, no_python: bool) -> list[str]:
    """Return what stands before the script in a rank's command, once it is certain that the script can be found."""
    if module and no_python:
        raise LaunchError("--module and --no_python exclude each other", fix="leave one of them out")
    if no_python:
        if shutil.which(script) is None:
            raise LaunchError(
                f"program {script!r} cannot be executed",
                where=str(Path.cwd()),
                fix="check the path, and that it is executable (chmod +x)",
            )
        return []
    if module:
        # Only the top package: looking further would import it, and with it perhaps torch.
        top = script.partition(".")[0]
        if PathFinder.find_spec(top, [str(Path.cwd())]) is None and importlib.util.find_spec(top) is None:
            raise LaunchError(
                f"module {script!r} cannot be found: there is no {top!r}",
                where=f"{Path.cwd()} and the packages of {sys.executable}",
                fix="check the spelling, start in the folder that holds it, or install it",
            )
        return [sys.executable, "-m"]
    path = Path(script)
    if not (path.is_file() or (path / "__main__.py").is_file()):
        raise LaunchError(
            f"script {script!r} " + ("has no __main__.py" if path.is_dir() else "does not exist"),
            where=str(Path.cwd()),
            fix="check the path; flags of `ds run` come before the script, the script's own after it",
        )
    return [sys.executable]
