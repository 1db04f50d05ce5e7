"""Packages combine as installed: ds-core alone, with a plugin, with a stranger's, with a newer and a too new one.

Each test has an environment of its own. Wheels of ours are really built and installed; what they declare from
elsewhere (torch and the like) is linked from the environment that runs the tests, and nothing else is: an import of
something undeclared fails here.
"""

from __future__ import annotations

import email
import importlib.metadata as metadata
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ACME = ROOT / "tests" / "third_party" / "acme-ds"
PIP = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check"]

TRAIN = """
import json, sys, torch, ds_core

def train(config):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    engine, optimizer, loader, schedule = ds_core.initialize(
        model=model, model_parameters=model.parameters(), config={"train_micro_batch_size_per_gpu": 8, **config}
    )
    assert loader is None and schedule is None
    x = torch.arange(32.0).reshape(8, 4) / 32
    y = x.sum(1, keepdim=True)
    losses = []
    for step in range(5):
        loss = (engine(x) - y).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    engine.destroy()
    return f"trained with {type(optimizer).__name__}, world {torch.distributed.get_world_size()}"

for text in sys.argv[1:]:
    try:
        outcome = train(json.loads(text))
    except ds_core.DsError as error:
        outcome = str(error)
    sys.stdout.write(json.dumps(outcome) + "\\n")
"""
"""Trains once per configuration given, in JSON, and prints how each went, in JSON."""
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


@dataclass(frozen=True)
class Environment:
    """A virtual environment without pip; ``pip`` installs into it from outside."""

    folder: Path

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    def install(self, *wheels: Path, needs: bool = True) -> subprocess.CompletedProcess[str]:
        """Install ``wheels`` from nowhere else; with ``needs`` pip checks what they declare."""
        options = ["--no-index", "--no-warn-script-location", *([] if needs else ["--no-deps"])]
        return run([*PIP, "--python", str(self.bin / "python"), "install", *options, *map(str, wheels)])

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run([str(self.bin / command), *arguments], cwd=self.folder)

    def train(self, *configs: dict) -> list[str]:
        """Train with each of ``configs``; return what there is to say of each, its error where it cannot be."""
        done = self.run("python", "-c", TRAIN, *map(json.dumps, configs))
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


def run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    # Neither the job these tests run in nor PYTHONPATH may reach the new environment.
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "120"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd, env=env)


def build(source: Path, folder: Path) -> Path:
    """Build the wheel of ``source`` with the hatchling that is here, and return it."""
    folder.mkdir()
    done = run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)])
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []


def needed(lines: list[str]) -> set[str]:
    """Return the distributions that ``lines`` need, directly or not, ours left out."""
    found: set[str] = set()
    waiting = list(lines)
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        # None of ours asks for an extra, so what a marker asks of one never applies.
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and name not in found and not name.startswith("ds-"):
            found.add(name)
            waiting += metadata.requires(name) or ()
    return found


def link(distributions: set[str], folder: Path) -> None:
    """Link all that ``distributions`` consist of into ``folder``."""
    for name in distributions:
        files = metadata.files(name)
        assert files, f"{name} was installed without a list of its files"
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            source = Path(metadata.distribution(name).locate_file(top))
            # A .pth would add whatever it names, such as an editable install of ours.
            if source.suffix != ".pth" and not (folder / top).exists():
                (folder / top).symlink_to(source)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels of this repository, of the stranger, and of launchers of other versions."""
    folder = tmp_path_factory.mktemp("wheels")
    sources = {
        "core": ROOT / "packages" / "ds-core",
        "launcher": ROOT / "packages" / "ds-launcher",
        "zero": ROOT / "packages" / "ds-zero",
        "acme": ACME,
        "patch": relabelled(folder / "patch-source", version="0.1.9"),
        "future": relabelled(folder / "future-source", version="0.2.0", core="0.2.0"),
    }
    return {name: build(source, folder / name) for name, source in sources.items()}


def relabelled(folder: Path, *, version: str, core: str | None = None) -> Path:
    """Copy ds-launcher's source with another version, made for another ds-core where ``core`` says so."""
    shutil.copytree(ROOT / "packages" / "ds-launcher", folder, ignore=shutil.ignore_patterns("tests", "__pycache__"))
    replace(folder / "src" / "ds_launcher" / "__init__.py", r'__version__ = ".*"', f'__version__ = "{version}"')
    if core is not None:
        replace(folder / "pyproject.toml", r"ds-core~=[\d.]+", f"ds-core~={core}")
    return folder


def replace(path: Path, pattern: str, text: str) -> None:
    changed, count = re.subn(pattern, text, path.read_text())
    assert count == 1, f"{pattern} occurs {count} times in {path.name}"
    path.write_text(changed)


@pytest.fixture(scope="module")
def needs(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Path:
    """What the wheels declare from elsewhere."""
    folder = tmp_path_factory.mktemp("needs")
    link(needed([line for wheel in wheels.values() for line in requirements(wheel)]), folder)
    return folder


@pytest.fixture
def environment(tmp_path: Path, needs: Path) -> Environment:
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "needs.pth").write_text(f"{needs}\n")
    return Environment(tmp_path / "env")


@pytest.fixture
def core(environment: Environment, wheels: dict[str, Path]) -> Environment:
    """An environment with the ds-core wheel alone."""
    done = environment.install(wheels["core"])
    assert done.returncode == 0, done.stderr
    return environment


def test_nothing_of_ours_is_there_before_it_is_installed(environment: Environment) -> None:
    done = environment.run("python", "-c", "import torch, ds_core")
    assert "No module named 'ds_core'" in done.stderr


def test_the_core_alone_trains_and_names_what_is_missing(core: Environment) -> None:
    plain, fp16, zero, off = core.train(
        SGD,
        {**SGD, "fp16": {"enabled": True}},
        {**SGD, "zero_optimization": {"stage": 2}},
        {**SGD, "fp16": {"enabled": False}, "zero_optimization": {"stage": 0}},
    )
    assert plain == "trained with SGD, world 1"
    assert '"fp16.enabled" needs ds-fp16: pip install ds-fp16' in fp16
    assert "pip install ds-zero" in zero
    assert off == plain, "sections that are off ask for no package"


def test_zero_needs_no_package_but_its_own(core: Environment, wheels: dict[str, Path]) -> None:
    done = core.install(wheels["zero"])
    assert done.returncode == 0, done.stderr
    trained, low, later = core.train(
        {**SGD, "zero_optimization": {"stage": 2}},
        {**SGD, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
        {**SGD, "zero_optimization": {"stage": 3}},
    )
    assert trained == "trained with DeepSpeedZeroOptimizer, world 1"
    assert "pip install ds-fp16" in low
    assert '"zero_optimization.stage 3" comes with a later release of ds-zero' in later


def test_ds_run_comes_with_the_launcher(core: Environment, wheels: dict[str, Path]) -> None:
    script = core.folder / "train.py"
    script.write_text(TRAIN)
    command = ("run", "--nproc", "2", str(script), json.dumps(SGD))

    done = core.run("ds", *command)
    assert done.returncode == 1
    assert "pip install ds-launcher" in done.stderr
    assert "Traceback" not in done.stderr

    assert core.install(wheels["launcher"]).returncode == 0
    done = core.run("ds", *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained with SGD, world 2") == 2, done.stdout


def test_a_strangers_package_is_used_by_its_words_alone(core: Environment, wheels: dict[str, Path]) -> None:
    assert installed(core).keys() == {"ds-core"}
    config = {
        "optimizer": {"type": "AcmeSign", "params": {"lr": 0.125}},
        "precision": {"type": "acme_scaled", "acme_scaled": {"scale": 16}},
        "partition": {"type": "acme_watched"},
        "acme": {"anvils": 2},
    }
    done = core.install(wheels["acme"])
    assert done.returncode == 0, done.stderr
    done = core.run("python", "-c", ACME_RUN, json.dumps(config))
    assert done.returncode == 0, done.stderr
    assert core.run("ds", "acme", "--anvils", "3").stdout == "dropped 3\n"
    assert "Drop anvils." in core.run("ds", "--help").stdout

    misspelt, unknown = core.train({**config, "acme": {"anvil": 2}}, {**config, "optimizer": {"type": "AcmeSing"}})
    assert "acme.anvil" in misspelt
    assert "anvils" in misspelt
    assert "'acmesign'" in unknown


ACME_RUN = """
import json, sys, torch, ds_core
from ds_core.config import load_config
from acme_ds import journal
from acme_ds.optimizer import AcmeSign

config = {"train_micro_batch_size_per_gpu": 8, **json.loads(sys.argv[1])}
assert load_config(config).sections["acme"].anvils == 2

torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
plain = torch.nn.Linear(4, 1)
plain.load_state_dict(model.state_dict())
engine, optimizer, _, _ = ds_core.initialize(model=model, model_parameters=model.parameters(), config=config)
x, y = torch.randn(8, 4), torch.randn(8, 1)
for step in range(3):
    loss = (engine(x) - y).square().mean()
    engine.backward(loss)
    engine.step()
assert journal.entries == 3 * [
    "partition reduce", "optimizer step", "partition publish", "precision kept at 16.0"
], journal.entries

# The same three steps by hand; a scale that is a power of two changes no bit of a gradient.
by_hand = AcmeSign(plain.parameters(), lr=0.125)
for step in range(3):
    by_hand.zero_grad()
    (plain(x) - y).square().mean().backward()
    by_hand.step()
for ours, theirs in zip(model.parameters(), plain.parameters()):
    assert torch.equal(ours, theirs), (ours, theirs)
engine.destroy()
"""


def test_a_newer_patch_of_a_plugin_installs_beside_an_unchanged_core(
    core: Environment, wheels: dict[str, Path]
) -> None:
    before = installed(core)
    assert core.install(wheels["launcher"]).returncode == 0
    done = core.install(wheels["patch"])
    assert done.returncode == 0, done.stderr
    assert installed(core) == {**before, "ds-launcher": "0.1.9"}
    done = core.run("ds", "run", "--help")
    assert done.returncode == 0, done.stderr
    assert "--nproc" in done.stdout


def test_a_plugin_for_the_next_core_is_refused_with_the_fix(core: Environment, wheels: dict[str, Path]) -> None:
    done = core.install(wheels["future"])
    assert done.returncode != 0, "pip itself must see that ds-core is too old"
    assert "ds-core~=0.2.0" in done.stdout + done.stderr

    assert core.install(wheels["future"], needs=False).returncode == 0
    done = core.run("ds", "run", "--nproc", "1", "nothing.py")
    assert done.returncode == 1
    assert (
        f"ds-launcher 0.2.0 is made for ds-core~=0.2.0, installed is ds-core {installed(core)['ds-core']}"
        in done.stderr
    )
    assert "fix: pip install --upgrade ds-launcher ds-core" in done.stderr
    assert "Traceback" not in done.stderr
    # What does not need it goes on.
    assert core.train(SGD) == ["trained with SGD, world 1"]


def installed(environment: Environment) -> dict[str, str]:
    """Return the versions of what is ours or the stranger's."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = json.loads(environment.run("python", "-c", code).stdout)
    return {name: version for name, version in found.items() if name.startswith(("ds-", "acme-"))}
