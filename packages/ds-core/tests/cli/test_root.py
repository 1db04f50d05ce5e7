"""``ds`` itself: lists, finds and runs its subcommands, and survives broken ones."""

from __future__ import annotations

import pytest

from ds_core import registry
from ds_core.cli import cli_main

HELLO = """
import typer
from ds_core.errors import ConfigError

app = typer.Typer()

@app.command()
def hello(word: str = "world") -> None:
    \"\"\"Greet, for a test.\"\"\"
    print("hello", word)

two = typer.Typer(help="Has two commands of its own.")
two.command("first")(lambda: print("one"))
two.command("second")(lambda: print("two"))

bad = typer.Typer()

@bad.command()
def fail() -> None:
    \"\"\"Raise.\"\"\"
    raise ConfigError("the key is wrong", where="ds.json", fix="use another")

buggy = typer.Typer()

@buggy.command()
def bug() -> None:
    \"\"\"Has a bug.\"\"\"
    raise ZeroDivisionError("a bug")

no_app = print
"""
NO_TORCH = """
import sys
def refuse(event, arguments):
    assert event != "import" or arguments[0].partition(".")[0] != "torch", "torch is imported"
sys.addaudithook(refuse)
"""


@pytest.fixture
def hello(site):
    site.module("hello_plugin", HELLO)
    words = {"hello": "app", "two": "two", "bad": "bad", "buggy": "buggy"}
    site.distribution("ds-hello", {word: f"hello_plugin:{target}" for word, target in words.items()})
    return site


def test_help_lists_every_subcommand_without_torch(hello):
    done = hello.ds("--help", before=NO_TORCH)
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("hello  ", "Greet, for a test.", "two  ", "Has two commands of its own.", "report  "):
        assert words in done.stdout
    # Nor does a plugin that asks for torch hide behind its own error.
    assert "cannot be used" not in done.stdout


def test_without_arguments_help_is_shown(hello):
    assert "Greet, for a test." in hello.ds().stdout


@pytest.mark.parametrize(
    ("arguments", "output"), [(("hello", "--word", "you"), "hello you\n"), (("two", "second"), "two\n")]
)
def test_subcommands_run(hello, arguments, output):
    done = hello.ds(*arguments, before=NO_TORCH)
    assert (done.returncode, done.stdout, done.stderr) == (0, output, "")


def test_an_error_is_three_lines_on_stderr(hello):
    done = hello.ds("bad")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "the key is wrong\n  where: ds.json\n  fix: use another\n"


def test_a_bug_keeps_its_traceback(hello):
    done = hello.ds("buggy")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.endswith("ZeroDivisionError: a bug\n")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import no_such_module", "the plugin cannot be imported: No module named 'no_such_module'"),
        ("this is no python", "SyntaxError: invalid syntax"),
        ("raise RuntimeError('not today')", "RuntimeError: not today"),
        ("app = print", "subcommand 'broken' is a builtin_function_or_method, expected a typer.Typer"),
    ],
)
def test_a_broken_plugin_is_listed_and_breaks_nothing_else(hello, text, problem):
    hello.module("broken_plugin", text)
    hello.distribution("ds-broken", {"broken": "broken_plugin:app"})
    listed = hello.ds("--help")
    assert listed.returncode == 0
    assert f"cannot be used: {problem}" in listed.stdout
    assert hello.ds("hello").stdout == "hello world\n"
    tried = hello.ds("broken", "--flag", "argument")
    assert (tried.returncode, tried.stdout) == (1, "")
    assert problem in tried.stderr
    assert "\n  fix: " in tried.stderr
    assert "Traceback" not in tried.stderr


def test_a_plugin_for_another_core_is_listed_with_the_reason(hello):
    hello.module("new_plugin", HELLO)
    hello.distribution("ds-new", {"new": "new_plugin:app"}, requires="ds-core~=9.0")
    assert "cannot be used: ds-new 1.2 is made for ds-core~=9.0" in hello.ds("--help").stdout
    tried = hello.ds("new")
    assert tried.returncode == 1
    assert "fix: pip install --upgrade ds-new ds-core" in tried.stderr


def test_two_packages_with_one_word_is_an_error(hello):
    hello.distribution("ds-also", {"hello": "hello_plugin:app"})
    assert "cannot be used: several packages register" in hello.ds("--help").stdout
    assert "uninstall all but one of ds-also, ds-hello" in hello.ds("hello").stderr


def test_a_misspelt_subcommand(hello):
    done = hello.ds("helo", "--word", "x")
    assert done.returncode == 1
    assert done.stderr.startswith("ds has no subcommand 'helo'\n")
    assert "fix: did you mean 'ds hello'?" in done.stderr
    assert "fix: `ds --help` lists what there is" in hello.ds("zzzzzz").stderr


def test_run_without_its_package(monkeypatch, capsys):
    found = registry.installed("cli")
    monkeypatch.setattr(registry, "installed", lambda seam: tuple(p for p in found if p.package == "ds-core"))
    with pytest.raises(SystemExit) as caught:
        cli_main(["run", "--nproc", "2", "train.py"])
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith('"ds run" needs ds-launcher: pip install ds-launcher\n')
    with pytest.raises(SystemExit):
        cli_main(["rnu"])
    assert "did you mean 'ds run'?" in capsys.readouterr().err


def test_version(site):
    import ds_core

    done = site.ds("--version")
    assert (done.returncode, done.stdout) == (0, f"ds-core {ds_core.__version__}\n")


def test_an_unknown_option_is_wrong_usage(site):
    done = site.ds("--no-such-option")
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr
