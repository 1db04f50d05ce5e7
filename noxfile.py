"""What a developer runs: ``nox -s NAME``; ``nox -l`` lists the sessions. The README says which matter first.

Every session installs with pip and ``constraints.txt``, which keeps CUDA builds of torch out, on the Python that runs
nox. Local packages are installed together in one command, so that no name of ours is looked up elsewhere.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
PAGE_TOOLS = ("config_reference", "volume_page", "right_numbers")
"""Modules of tools/ that write a page of docs/ (``--write``), or tell where it is not what they would write."""
BENCHMARKS = sorted(path.stem for path in ROOT.glob("benchmarks/[!_]*.py"))

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_external_run = True
nox.options.error_on_missing_interpreters = True

PYTEST = ("python", "-m", "pytest", "--durations=12", "--durations-min=2")
QUIET_ENV = {
    # pip would compile all of torch, which takes as long as unpacking it; Python compiles what is imported.
    "PIP_NO_COMPILE": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    # Ranks of one test share few cores; without this each starts a thread per core and they wait for each other.
    "OMP_NUM_THREADS": "1",
    # A run must not depend on the job it was started from.
    **dict.fromkeys(
        ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    ),
}


@nox.session
def tests(session: nox.Session) -> None:
    """The whole suite, all packages together; arguments go to pytest."""
    install(session, *editable(), *group(ROOT, "test"))
    chosen = session.posargs or ["packages", "tests"]
    session.run(*PYTEST, *without_slow(chosen), *chosen)


@nox.session
@nox.parametrize("package", PACKAGES)
def tests_alone(session: nox.Session, package: str) -> None:
    """One package from its wheel, with nothing but what it declares: nox -s "tests_alone(package='ds-core')"."""
    wheels = Path(session.create_tmp()) / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    build_wheels(session, wheels, with_needs(package))
    folder = ROOT / "packages" / package
    install(session, *map(str, sorted(wheels.glob("*.whl"))), *group(folder, "test"))
    chosen = session.posargs or [f"packages/{package}/tests"]
    session.run(*PYTEST, *without_slow(chosen), *chosen)


@nox.session
def matrix(session: nox.Session) -> None:
    """The long products that `tests` leaves out."""
    install(session, *editable(), *group(ROOT, "test"))
    # pytest ends with 5 where nothing is marked slow (yet): that is not a failure.
    session.run(*PYTEST, "-m", "slow", *(session.posargs or ["packages", "tests"]), success_codes=[0, 5])


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: rules and layout. `nox -s lint -- --fix` mends both."""
    install(session, *group(ROOT, "lint"))
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--check"]), ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict on the sources of every package."""
    install(session, *editable(), *group(ROOT, "types"))
    session.run("mypy", "--strict", *(str(path) for path in sources()), env={"MYPYPATH": ":".join(map(str, sources()))})


@nox.session
def build(session: nox.Session) -> None:
    """Wheel and sdist of every package in dist/, looked through and installed."""
    install(session, *group(ROOT, "build"))
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for package in PACKAGES:
        # The sdist first and the wheel from it, which shows that the sdist is complete.
        session.run("python", "-m", "build", "--outdir", str(dist), str(ROOT / "packages" / package), silent=True)
    session.run("python", "tools/check_dist.py", str(dist))
    # Needs are left out: tests_alone installs them. Importing a package's root needs nothing heavy.
    session.install("--no-deps", "--force-reinstall", *map(str, sorted(dist.glob("*.whl"))))
    imports = "; ".join(f"import {name}; print({name!r}, {name}.__version__)" for name in map(import_name, PACKAGES))
    session.install("packaging")
    session.run("python", "-c", imports)


@nox.session(venv_backend="none")
def new(session: nox.Session) -> None:
    """Write the skeleton of a package that installs: nox -s new -- ds-NAME."""
    session.run(sys.executable, "tools/new_package.py", *session.posargs, external=True)


@nox.session
def demo(session: nox.Session) -> None:
    """Train a small GPT on real text, stop, resume, sample; arguments go to examples/demo.py."""
    requirements = ROOT / "examples" / "requirements.txt"
    install(session, *editable("ds-core", "ds-launcher", "ds-fp16", "ds-zero"), "-r", str(requirements))
    # The demo uses the machine's cores itself.
    session.run("python", "examples/demo.py", *session.posargs, env={"OMP_NUM_THREADS": None})


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks against their peers: nox -s bench -- [NAME ...] [-- options of the scripts]."""
    install(session, *editable())
    run_benchmarks(session)


@nox.session
def docs(session: nox.Session) -> None:
    """Examples of docstrings and READMEs, and the pages that tools write; `nox -s docs -- --write` writes these."""
    if "--write" in session.posargs:
        install(session, *editable())  # all: plugins have options
        for tool in PAGE_TOOLS:
            session.run("python", f"tools/{tool}.py", "--write")
        return
    install(session, *editable(), *group(ROOT, "test"))
    session.run(*PYTEST, "tests/test_docs.py", "tests/test_config_reference.py", *session.posargs)
    for tool in PAGE_TOOLS:
        session.run("python", f"tools/{tool}.py")


@nox.session(venv_params=["--system-site-packages"])
def gpu(session: nox.Session) -> None:
    """Device tests and every benchmark, results in benchmarks/results/; skipped where there is no CUDA device."""
    if shutil.which("nvidia-smi") is None:
        session.skip("no CUDA device: nvidia-smi is not on PATH")
    if subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode != 0:
        session.skip("no CUDA device: nvidia-smi lists none")
    # The one session without the constraints, on the machine's own packages: a CUDA torch that is there is kept.
    session.env.update(QUIET_ENV)
    session.install(*editable(), *group(ROOT, "test"))
    # 5: nothing is marked gpu (yet).
    session.run(*PYTEST, "-m", "gpu", "packages", "tests", success_codes=[0, 5])
    run_benchmarks(session, results=ROOT / "benchmarks" / "results")


def install(session: nox.Session, *what: str) -> None:
    session.env.update(QUIET_ENV)
    session.install("-c", str(ROOT / "constraints.txt"), *what)


def editable(*packages: str) -> list[str]:
    """Return pip's arguments for an editable install of ``packages``, or of all."""
    return [word for package in packages or PACKAGES for word in ("-e", str(ROOT / "packages" / package))]


def sources() -> list[Path]:
    return [ROOT / "packages" / package / "src" for package in PACKAGES]


def import_name(package: str) -> str:
    return package.replace("-", "_")


def group(folder: Path, name: str) -> list[str]:
    """Return the requirements of a dependency group of ``folder/pyproject.toml``."""
    return list(nox.project.dependency_groups(nox.project.load_toml(folder / "pyproject.toml"), name))


def with_needs(package: str) -> list[str]:
    """Return ``package`` and the packages of this repository that it needs, directly or not."""
    found: list[str] = []
    waiting = [package]
    while waiting:
        name = waiting.pop()
        found.append(name)
        project = nox.project.load_toml(ROOT / "packages" / name / "pyproject.toml")["project"]
        needs = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in project.get("dependencies", [])]
        waiting += [need for need in needs if need in PACKAGES and need not in (*found, *waiting)]
    return sorted(found)


def build_wheels(session: nox.Session, folder: Path, packages: list[str]) -> None:
    session.env.update(QUIET_ENV)
    paths = [str(ROOT / "packages" / package) for package in packages]
    session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *paths)


def without_slow(arguments: list[str]) -> list[str]:
    """Leave the long products to `matrix`, unless the caller chooses by marks."""
    return [] if "-m" in arguments else ["-m", "not slow"]


def run_benchmarks(session: nox.Session, *, results: Path | None = None) -> None:
    """Run the named benchmarks, or all; words after a second ``--`` go to each script.

    With ``results`` the table and the JSON of each are written there, as NAME.txt and NAME.json.
    """
    words = list(session.posargs)
    at = words.index("--") if "--" in words else len(words)
    unknown = sorted(set(words[:at]) - set(BENCHMARKS))
    if unknown:
        session.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    for name in words[:at] or BENCHMARKS:
        command = ["python", f"benchmarks/{name}.py", *words[at + 1 :]]
        # Benchmarks choose their threads themselves.
        if results is None:
            session.run(*command, env={"OMP_NUM_THREADS": None})
            continue
        results.mkdir(exist_ok=True)
        record = ["--json", str(results / f"{name}.json")]
        table = session.run(*command, *record, env={"OMP_NUM_THREADS": None}, silent=True)
        print(table)
        (results / f"{name}.txt").write_text(str(table))
