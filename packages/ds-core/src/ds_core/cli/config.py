"""``ds config``: check a configuration, explain it, and what editors and old files need. Loads no torch."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ds_core.config.loading import Examined
    from ds_core.config.problems import Problem
    from ds_core.config.rewriting import Rewritten

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Check and explain configurations; no model, no GPU and no torch is needed.",
)

World = Annotated[
    int | None,
    typer.Option("--world", min=1, metavar="N", help="Data-parallel ranks, for the batch sizes; else they stay open."),
]
Compatible = Annotated[
    bool | None,
    typer.Option(
        "--compatible/--strict",
        help="Drop keys that DeepSpeed ignores with a warning; default: as DS_CONFIG_COMPATIBLE says, else strict.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the same as JSON.")]
MOST_PROBLEMS = 100
"""Problems of one file that are printed; JSON has all."""


@app.callback()
def _several_commands() -> None:
    """Without it an application with one command would be that command."""


@app.command()
def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="JSON or HJSON.")],
    world: World = None,
    compatible: Compatible = None,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with each file, all at once, with line and column. Exits with 1 if anything is."""
    from ds_core.config.loading import examine

    # What is wrong with the environment is no file's fault, so it is not told as one: it ends the command here.
    examine({}, compatible=compatible)
    results = [_checked(file, world, compatible) for file in files]
    if as_json:
        import json

        typer.echo(json.dumps(results, indent=2))
    else:
        for result in results:
            _print_check(result)
    raise typer.Exit(0 if all(result["ok"] for result in results) else 1)


@app.command()
def explain(
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSON or HJSON.")],
    world: World = None,
    compatible: Compatible = None,
    all_keys: Annotated[bool, typer.Option("--all", help="Also what is off or changes nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show every effective value and where it came from. Exits with 1 if there are problems, which are shown too."""
    from ds_core.cli import explanation as shown
    from ds_core.config.explain import explain as explained
    from ds_core.config.loading import examine
    from ds_core.config.plugin_options import with_plugins

    examined, notes = with_plugins(examine(file, dp_world_size=world, compatible=compatible))
    found = explained(examined, all_keys=all_keys)
    found = replace(found, notes=(*found.notes, *(note for note in notes if note.kind == "unchecked")))
    if as_json:
        import json

        result = {"file": file, "ok": not examined.problems, **_findings(examined), **shown.as_json(found)}
        typer.echo(json.dumps(result, indent=2))
    else:
        _print_problems(file, _findings(examined)["problems"])
        count = len(examined.problems)
        _print_heading(f"{file}: {_problems(count) if count else _summary(examined)}")
        typer.echo()
        for line, is_heading in shown.lines(found, shutil.get_terminal_size().columns):
            (_print_heading if is_heading else typer.echo)(line)
    raise typer.Exit(1 if examined.problems else 0)


@app.command()
def schema(
    section: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="One top-level key, such as zero_optimization; default: all.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", metavar="FILE", help="Write it there.")] = None,
) -> None:
    """Print the JSON Schema (draft 2020-12), with which editors complete and check configurations."""
    import json

    from ds_core.config.schema import json_schema

    text = json.dumps(json_schema(section), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        _write(output, text)


@app.command()
def migrate(
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSON or HJSON.")],
    in_place: Annotated[bool, typer.Option("--in-place", help="Write the result to FILE.")] = False,
    output: Annotated[str | None, typer.Option("--output", metavar="FILE", help="Write the result there.")] = None,
    backup: Annotated[bool, typer.Option("--backup", help="With --in-place: keep the old FILE as FILE.bak.")] = False,
    drop_comments: Annotated[
        bool, typer.Option("--drop-comments", help="Where comments cannot be kept, write plain JSON without them.")
    ] = False,
) -> None:
    """Rewrite deprecated keys as today's and print the result; say on stderr what was done."""
    from pathlib import Path

    from ds_core.config.reading import read
    from ds_core.config.rewriting import replace_file, rewritten

    if in_place and output is not None:
        raise typer.BadParameter("--in-place and --output exclude each other")
    if backup and not in_place:
        raise typer.BadParameter("--backup needs --in-place")
    document = read(Path(file))
    result = rewritten(document, drop_comments=drop_comments)
    if output is not None:
        _write(output, result.text)
    elif not in_place:
        typer.echo(result.text, nl=False)
    elif result.renamed:
        assert document.file is not None
        saved = replace_file(document.file, result.text, backup=backup)
        if saved is not None:
            typer.echo(f"{file}: the old file is {saved}", err=True)
    _print_migration(file, result)


def _write(output: str, text: str) -> None:
    from pathlib import Path

    from ds_core.config.rewriting import replace_file

    replace_file(Path(output), text)


def _print_migration(file: str, result: Rewritten) -> None:
    from ds_core.config.loading import find_problems
    from ds_core.config.reading import read_text

    count = len(result.renamed)
    done = f"{count} deprecated key{'' if count == 1 else 's'} rewritten" if count else "no deprecated keys"
    typer.echo(f"{file}: {done}", err=True)
    for row in result.renamed:
        if row.new is None:
            now = "removed" if row.instead is None else f"removed: {row.text}"
        elif row.new == row.old and row.instead is not None:
            now = row.instead
        else:
            now = _dotted(row.new)
        typer.echo(f"  {_dotted(row.old)} -> {now}", err=True)
    problems = find_problems(read_text(result.text, file).raw)
    if problems:
        typer.echo(f"{file}: {_problems(len(problems))} left: `ds config check` tells them", err=True)


def _problems(count: int) -> str:
    return f"{count} problem{'' if count == 1 else 's'}"


def _print_heading(text: str) -> None:
    typer.secho(text, bold=True)


def _checked(file: str, world: int | None, compatible: bool | None) -> dict[str, Any]:
    """Return what was found in ``file`` as JSON can hold it."""
    from ds_core.config.loading import examine
    from ds_core.config.notes import of_later_releases
    from ds_core.config.plugin_options import with_plugins
    from ds_core.errors import ConfigError

    try:
        examined, notes = with_plugins(examine(file, dp_world_size=world, compatible=compatible))
        told = {note.path for note in notes}
        notes += [note for note in of_later_releases(examined.config) if note.path not in told]
    except ConfigError as error:
        # One file that cannot be read must not hide what is wrong with the others.
        where = None if error.where == file else error.where
        problem = {"path": "", "text": error.what, "where": where, "fix": error.fix, **_place(None)}
        nothing: dict[str, Any] = {"warnings": [], "deprecated": [], "hints": [], "notes": []}
        return {"file": file, "ok": False, "is": None, "problems": [problem], **nothing}
    return {
        "file": file,
        "ok": not examined.problems,
        "is": None if examined.problems else _summary(examined),
        **_findings(examined),
        "hints": _hints(examined),
        "notes": [{"kind": note.kind, "path": note.path, "text": note.text} for note in notes],
    }


def _findings(examined: Examined) -> dict[str, Any]:
    """Return problems, what compatibility mode dropped, and deprecated keys, in the order of the file."""
    deprecated = [
        {"path": _dotted(row.old), "text": row.text, **_place(examined.document.position(row.old))}
        for row in examined.renamed
    ]
    return {
        "problems": [_as_dict(problem) for problem in examined.problems],
        "warnings": [_as_dict(problem) for problem in examined.warnings],
        "deprecated": sorted(deprecated, key=lambda row: (row["line"] or 0, row["column"] or 0)),
    }


def _as_dict(problem: Problem) -> dict[str, Any]:
    return {"path": problem.path, "text": problem.text, "fix": problem.fix, **_place(problem.place)}


def _place(place: tuple[int, int] | None) -> dict[str, int | None]:
    line, column = place or (None, None)
    return {"line": line, "column": column}


def _dotted(keys: tuple[str | int, ...]) -> str:
    from ds_core.config.paths import dotted

    return dotted(keys)


def _summary(examined: Examined) -> str:
    """Return what the configuration is, in one line.

    >>> from ds_core.config.loading import examine
    >>> _summary(examine({"train_batch_size": 8, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}))
    'ZeRO stage 2, bf16, no optimizer'
    """
    config = examined.config
    partition = config.partition.chosen or f"ZeRO stage {config.zero_optimization.stage}"
    words = [partition, config.plugin("precision"), config.optimizer.type if config.optimizer else "no optimizer"]
    if config.scheduler is not None:
        words.append(config.scheduler.type)
    if examined.dp_world_size is not None:
        sizes = (config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps, examined.dp_world_size)
        words.append(f"batch {config.train_batch_size} = {' x '.join(map(str, sizes))}")
    return ", ".join(words)


def _hints(examined: Examined) -> list[str]:
    """Return what else is good to know about the problems of ``examined``."""
    from ds_core.config.loading import find_problems
    from ds_core.config.paths import open_paths

    if examined.dp_world_size is None:
        return []
    raw = examined.document.raw
    wrong = {problem.keys for problem in examined.problems}.intersection(open_paths(raw))
    if wrong:  # what stays without --world, such as a misspelt key, is not what this is about
        wrong -= {problem.keys for problem in find_problems(raw)}
    if not wrong:
        return []
    count = len(wrong)
    values = "1 value is" if count == 1 else f"{count} values are"
    return [f'{values} "auto": leave out --world if the client that calls initialize fills them in']


def _print_problems(file: str, problems: list[dict[str, Any]]) -> None:
    for problem in problems[:MOST_PROBLEMS]:
        _print_finding(file, problem)
    if len(problems) > MOST_PROBLEMS:
        typer.echo(f"{file}: and {len(problems) - MOST_PROBLEMS} more")


def _print_check(result: dict[str, Any]) -> None:
    _print_problems(result["file"], result["problems"])
    for warning in result["warnings"]:
        _print_finding(result["file"], {**warning, "fix": None}, "ignored in compatibility mode: ")
    for old in result["deprecated"]:
        _print_finding(result["file"], {**old, "text": f"deprecated, {old['text']}", "fix": None})
    if result["ok"]:
        typer.echo(f"{result['file']}: ok: {result['is']}")
    elif len(result["problems"]) > 1:
        typer.echo(f"{result['file']}: {_problems(len(result['problems']))}")
    for note in result["notes"]:
        typer.echo(f"  note: {note['path']}: {note['text']}")
    for hint in result["hints"]:
        typer.echo(f"  hint: {hint}")


def _print_finding(file: str, finding: dict[str, Any], before: str = "") -> None:
    # file:line:column is what editors and terminals make a link of.
    where = file if finding["line"] is None else f"{file}:{finding['line']}:{finding['column']}"
    path = f"{finding['path']}: " if finding["path"] else ""
    typer.echo(f"{where}: {before}{path}{finding['text']}")
    if finding.get("where"):
        typer.echo(f"  where: {finding['where']}")
    if finding["fix"]:
        typer.echo(f"  fix: {finding['fix']}")
