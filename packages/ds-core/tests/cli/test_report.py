from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from ds_core.cli.report import print_report

FACTS = {
    "machine": {
        "python": "3.12.1",
        "executable": "/bin/python",
        "system": "Linux",
        "cpu_cores": 8,
        "cpu_cores_usable": 2,
        "memory_bytes": 3 * 2**30,
    },
    "packages": {"ds-core": "0.1.0", "ds-odd": "7.0"},
    "torch": {
        "version": "2.13.0",
        "problem": None,
        "cuda": "13.0",
        "backends": {"gloo": True, "nccl": False},
        "accelerator": {
            "kind": "cuda",
            "backend": "nccl",
            "dtypes": ["float32", "bfloat16"],
            "devices": [{"name": "cuda:0", "memory_bytes": 80 * 2**30}],
            "problem": None,
        },
    },
    "plugins": [
        {"seam": "cli", "name": "report", "package": "ds-core", "version": "0.1.0", "built_in": True, "problem": None},
        {
            "seam": "ops",
            "name": "odd",
            "package": "ds-odd",
            "version": "7.0",
            "built_in": False,
            "problem": "[bold]it broke[/bold]",
        },
    ],
    "missing": [{"package": "ds-zero", "brings": ["partition 1"], "install": "pip install ds-zero"}],
}


def printed(facts, width=120) -> str:
    stream = io.StringIO()
    print_report(facts, Console(file=stream, width=width))
    return stream.getvalue()


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_everything_is_printed():
    found = rows(printed(FACTS))
    for row in (
        ["Python", "3.12.1 (/bin/python)"],
        ["CPU cores", "2 usable of 8"],
        ["memory", "3.0 GiB"],
        ["torch", "2.13.0, CUDA 13.0"],
        ["backends", "gloo yes, nccl no"],
        ["accelerator", "cuda, communicates with nccl"],
        ["dtypes", "float32, bfloat16"],
        ["device cuda:0", "80.0 GiB"],
        ["ds-odd", "7.0"],
        ["cli", "report", "built in", "ok"],
        # Brackets are text, not markup.
        ["ops", "odd", "ds-odd 7.0", "[bold]it broke[/bold]"],
        ["ds-zero", "partition 1", "pip install ds-zero"],
    ):
        assert row in found


@pytest.mark.parametrize("width", [40, 60])
def test_nothing_is_cut_off_on_a_narrow_terminal(width):
    facts = {**FACTS, "packages": {"ds-core": "x" * 200}}
    text = printed(facts, width)
    assert text.count("x") >= 200
    assert "…" not in text


def test_a_broken_accelerator_is_printed():
    torch = {**FACTS["torch"], "accelerator": {"problem": "the driver does not answer"}}
    assert ["accelerator", "the driver does not answer"] in rows(printed({**FACTS, "torch": torch}))


def test_json_holds_what_the_tables_show(site):
    done = site.ds("report", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert set(facts) == set(FACTS)
    assert set(facts["machine"]) == set(FACTS["machine"])
    assert set(facts["torch"]) == set(FACTS["torch"])


def test_without_torch_it_says_so(site):
    site.module("torch", "raise ImportError('libtorch.so is missing')")
    done = site.ds("report")
    assert done.returncode == 0, done.stderr
    assert "torch cannot be imported: ImportError: libtorch.so is missing" in done.stdout
    facts = json.loads(site.ds("report", "--json").stdout)
    assert facts["torch"]["version"] is None
    problems = {(plugin["seam"], plugin["name"]): plugin["problem"] for plugin in facts["plugins"]}
    assert problems["cli", "report"] is None
    assert problems["accelerator", "cpu"] == "the plugin cannot be imported: libtorch.so is missing"


def test_third_party_packages_and_their_problems_are_listed(site):
    site.module("odd_ops", "1 / 0")
    site.distribution("ds-odd", {"odd": "odd_ops:Odd"}, seam="ops", requires="ds-core")
    facts = json.loads(site.ds("report", "--json").stdout)
    assert facts["packages"]["ds-odd"] == "1.2"
    (odd,) = [plugin for plugin in facts["plugins"] if plugin["package"] == "ds-odd"]
    assert odd["problem"] == "ZeroDivisionError: division by zero"
    assert odd["built_in"] is False
