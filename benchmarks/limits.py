"""The time limits of the promises, measured on this machine: importing, the command line, installing.

CPU time of a fresh interpreter, so that a busy machine changes little. Limits are for a reader to judge: a slow machine
may be above one without any fault of ours, so nothing fails unless --strict is given.

    python benchmarks/limits.py
    python benchmarks/limits.py --with-dependencies        # also installs what we need beside torch, from the index
    python benchmarks/limits.py --smoke                    # one run each, no install
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from _report import Row, add_output_arguments, finish, limit_row
from packaging.requirements import Requirement

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
IMPORT_LIMIT_S = 0.050  # promise P16
INSTALL_LIMIT_S = 10.0  # promise P01
EXPLAIN_LIMIT_S = 0.5  # what `ds config explain` may take
TIMEOUT_S = 300

EXPLAINED = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-5}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True},
}
"""What ``ds config explain`` is timed on: as transformers writes it, with ``"auto"`` and values to derive."""


def import_names() -> list[str]:
    """Return the packages of this repository that are installed here."""
    names = sorted(path.name for path in ROOT.glob("packages/*/src/*") if (path / "__init__.py").exists())
    return [name for name in names if find_spec(name)]


def statement_cpu_s(statement: str, *, after: str = "") -> float:
    """Return the CPU seconds of ``statement`` in a fresh interpreter that has run ``after``, which is not counted."""
    code = f"{after}\nimport time; begin = time.process_time()\n{statement}\nprint(time.process_time() - begin)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise SystemExit(f"{statement!r} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def command_cpu_s(command: Sequence[str]) -> float:
    """Return the CPU seconds of ``command`` and its children, the interpreter's start included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def import_rows(runs: int) -> list[Row]:
    loaded = "import torch, pydantic"
    statements = [
        *((f"import {name}", loaded, IMPORT_LIMIT_S) for name in import_names()),
        # What the lazy import above puts off until a script trains.
        ("from ds_core import initialize", loaded, None),
        ("import ds_core", "", None),
        ("import torch", "", None),  # the scale to read the others by
    ]
    rows = []
    for statement, after, limit in statements:
        statement_cpu_s(statement, after=after)  # files into the cache, bytecode written
        values = [1e3 * statement_cpu_s(statement, after=after) for _ in range(runs)]
        name = f"{statement}, {'torch and pydantic loaded' if after else 'nothing loaded'}"
        rows.append(limit_row(name, values, limit and 1e3 * limit, unit="ms CPU"))
    return rows


def command_rows(runs: int) -> list[Row]:
    ds = shutil.which("ds", path=str(Path(sys.executable).parent)) or shutil.which("ds")
    if ds is None:
        raise SystemExit("the command ds is not installed here: pip install -e packages/ds-core")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "ds_config.json")
        config.write_text(json.dumps(EXPLAINED))
        commands = [
            ("ds --help", [ds, "--help"], None),
            ("ds config explain", [ds, "config", "explain", str(config), "--world", "4"], EXPLAIN_LIMIT_S),
            ("python -c pass", [sys.executable, "-c", "pass"], None),
        ]
        rows = []
        for name, command, limit in commands:
            command_cpu_s(command)
            values = [1e3 * command_cpu_s(command) for _ in range(runs)]
            rows.append(limit_row(name, values, limit and 1e3 * limit, unit="ms CPU"))
        return rows


def pip(python: str | Path, *arguments: str | Path) -> float:
    """Run pip of ``python`` quietly and return the wall seconds."""
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise SystemExit(f"pip {' '.join(map(str, arguments))} failed:\n{done.stderr}")
    return time.perf_counter() - begin


def dependencies() -> list[str]:
    """Return what our installed packages need beside torch and each other, optional extras left out."""
    ours = {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")}
    needs = [Requirement(text) for name in ours for text in metadata.requires(name) or []]
    return sorted({str(need) for need in needs if need.name not in {"torch", *ours} and need.marker is None})


def install_rows(*, with_dependencies: bool) -> list[Row]:
    """Build our wheels, then time their install into an empty virtual environment."""
    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder, "wheels")
        # Without hatchling here pip fetches it for the build, which is not timed either way.
        isolation = ["--no-build-isolation"] if find_spec("hatchling") else []
        projects = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
        pip(sys.executable, "wheel", "--no-deps", *isolation, "-w", wheels, *projects)
        venv.create(Path(folder, "venv"), with_pip=True)
        python = Path(folder, "venv", "bin", "python")
        built = sorted(wheels.glob("*.whl"))
        seconds = pip(python, "install", "--no-deps", "--no-index", *built)
        rows = [limit_row(f"pip install of our {len(built)} wheels", [seconds], INSTALL_LIMIT_S, unit="s")]
        if with_dependencies:
            seconds += pip(python, "install", "-c", ROOT / "constraints.txt", *dependencies())
            name = f"the same and {len(dependencies())} dependencies beside torch, download included"
            rows.append(limit_row(name, [seconds], INSTALL_LIMIT_S, unit="s"))
        return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="fresh interpreters per row (default 5)")
    parser.add_argument("--no-install", action="store_true", help="leave the install out")
    parser.add_argument(
        "--with-dependencies", action="store_true", help="also install the dependencies beside torch (needs an index)"
    )
    parser.add_argument("--smoke", action="store_true", help="one run each and no install")
    add_output_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    runs = 1 if arguments.smoke else arguments.runs
    rows = [*import_rows(runs), *command_rows(runs)]
    if not (arguments.no_install or arguments.smoke):
        rows += install_rows(with_dependencies=arguments.with_dependencies)
    return finish("time limits of the promises", rows, {"runs": runs}, arguments)


if __name__ == "__main__":
    sys.exit(main())
