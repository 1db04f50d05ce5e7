"""Promise P16: an import does nothing but define names. Checked in other processes by tools/hygiene_probe.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from layers import module_name, source_files

ROOT = Path(__file__).parents[1]
PROBE = ROOT / "tools" / "hygiene_probe.py"
SOURCES = sorted(ROOT.glob("packages/*/src"))
MODULES = {
    src.parent.name: [module_name(path, src) for path in source_files(src) if path.name != "__main__.py"]
    for src in SOURCES
}
TORCH_FREE_PACKAGES = ("ds-launcher",)
TORCH_FREE_FLOORS = ("errors", "_packages", "log", "registry", "config", "elasticity", "interfaces", "cli")
TORCH_FREE = [
    name
    for package, names in MODULES.items()
    for name in names
    if package in TORCH_FREE_PACKAGES
    or "." not in name  # every package's root resolves its names on first use
    or name.split(".")[1:2] in [[one] for one in TORCH_FREE_FLOORS]
]


def probe(*arguments: str, path: Path | None = None) -> dict[str, list[str]]:
    code = [sys.executable, "-E", str(PROBE), *arguments]
    if path is not None:
        code = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r}); sys.argv = {code[2:]!r};"]
        code[-1] += f" import runpy; runpy.run_path({str(PROBE)!r}, run_name='__main__')"
    done = subprocess.run(code, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("package", MODULES)
def test_importing_a_module_does_nothing_else(package: str) -> None:
    found = probe(*MODULES[package])
    assert [f"{name}: {finding}" for name, findings in found.items() for finding in findings] == []
    assert list(found) == MODULES[package]


def test_what_runs_without_a_model_loads_no_torch() -> None:
    assert {"ds_core", "ds_core.cli", "ds_core.config", "ds_core.registry", "ds_fp16", "ds_launcher"} <= set(TORCH_FREE)
    found = probe("--without-torch", *TORCH_FREE)
    assert [f"{name}: {finding}" for name, findings in found.items() for finding in findings] == []


CULPRITS = [
    ("import subprocess; subprocess.run(['true'])", "subprocess.Popen"),
    ("import socket; socket.socket()", "socket.__new__"),
    ("open('/dev/null', 'w')", "opens '/dev/null' for writing"),
    ("import os; os.open('/dev/null', os.O_WRONLY)", "opens '/dev/null' for writing"),
    ("import os; os.environ['A'] = 'b'", "changes the environment"),
    ("import os; os.system('true')", "os.system"),
    ("print('hello')", "prints 'hello"),
    ("import os; os.write(2, b'hello')", "prints 'hello'"),
    ("import logging; logging.basicConfig()", "changes the root logger"),
    ("import warnings; warnings.simplefilter('ignore')", "changes the warning filters"),
    ("import sys; sys.excepthook = print", "changes exception hooks"),
    ("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)", "changes signal handlers"),
    ("import torch; torch.cuda.is_available()", "calls torch.cuda.is_available"),
    ("import torch; torch.nn.Module.cuda = print", "changes torch.nn.Module"),
    ("import torch; torch.nn.functional.linear = print", "changes torch.nn.functional"),
    ("import torch; torch.set_num_threads(torch.get_num_threads() + 1)", "changes torch's defaults"),
    ("import torch; torch.rand(1)", "changes torch's random state"),
    ("import torch.distributed.fsdp", "loads torch.distributed.fsdp"),
    (
        "import threading, time; threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
        "changes threads",
    ),
    ("1 / 0", "fails: "),
]
"""(what a module does when it is imported, what the probe must say)."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What the probe says of a module per culprit, and of one that does nothing."""
    folder = tmp_path_factory.mktemp("culprits")
    (folder / "innocent.py").write_text("import json\nVALUE = 1\n")
    for number, (code, _) in enumerate(CULPRITS):
        (folder / f"culprit{number}.py").write_text(code)
    return probe("innocent", *(f"culprit{number}" for number in range(len(CULPRITS))), path=folder)


@pytest.mark.parametrize("number", range(len(CULPRITS)), ids=[complaint for _, complaint in CULPRITS])
def test_the_probe_sees(seen: dict[str, list[str]], number: int) -> None:
    assert any(CULPRITS[number][1] in finding for finding in seen[f"culprit{number}"]), seen[f"culprit{number}"]


def test_the_probe_accuses_no_innocent(seen: dict[str, list[str]]) -> None:
    assert seen["innocent"] == []


def test_the_probe_sees_torch(tmp_path: Path) -> None:
    (tmp_path / "culprit.py").write_text("import torch\n")
    assert "loads torch" in probe("--without-torch", "culprit", path=tmp_path)["culprit"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["report", "--help"], ["config", "check", "--help"]], ids=" ".join
)
def test_the_ds_command_shows_help_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from ds_core.cli import cli_main\n"
        f"sys.argv = ['ds', *{arguments!r}]\n"
        "try:\n"
        "    cli_main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: ds" in done.stdout
