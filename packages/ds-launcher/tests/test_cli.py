"""``ds run``: what is refused before anything starts, and what a dry run shows."""

from __future__ import annotations

import socket
import sys

import pytest
from typer.testing import CliRunner

from ds_core.testing.cli import SubcommandContract
from ds_launcher.cli import app


class TestRun(SubcommandContract):
    @pytest.fixture
    def name(self):
        return "run"

    @pytest.fixture
    def entry(self):
        return "ds_launcher.cli:app"

    @pytest.fixture
    def failing(self):
        return ["no-such-script.py"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.py"], "script 'nothing.py' does not exist"),
        (["."], "script '.' has no __main__.py"),
        (["--no_python", "./nothing"], "program './nothing' cannot be executed"),
        (["-m", "nothing.train"], "module 'nothing.train' cannot be found: there is no 'nothing'"),
        (["-m", "--no_python", "x"], "--module and --no_python exclude each other"),
        (["--nproc", "2", "--num_gpus", "3", "script.py"], "--nproc 2 and --num_gpus 3 both give the number of ranks"),
        (["--num_gpus", "3", "script.py"], "--num_gpus 3 asks for more GPUs than the 2 that are visible"),
        (["--nproc", "1", "--log-dir", "script.py", "script.py"], "'script.py' cannot be made a folder: File exists"),
    ],
)
def test_refused_with_a_reason(jobs, arguments, message):
    jobs.script("say('started')")
    result = jobs.start_command("run", *arguments, env={"CUDA_VISIBLE_DEVICES": "0,1"}).finish()
    assert (result.code, result.out) == (1, b"")
    assert result.error.startswith(message + "\n")
    assert "\n  fix: " in result.error
    assert "Traceback" not in result.error


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", ""])
def test_the_number_of_ranks_must_be_one(jobs, value):
    result = jobs.run("say('started')", "--nproc", value)
    assert (result.code, result.out) == (2, b"")
    assert "--nproc" in result.error
    assert "Traceback" not in result.error


def test_a_port_in_use_is_refused_before_anything_starts(jobs):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = jobs.run("say('started')", "--nproc", "1", "--master_port", str(port))
    assert (result.code, result.out) == (1, b"")
    assert result.error.startswith(f"port {port} is already in use on this machine\n")


def test_a_given_address_and_port_reach_the_ranks(jobs):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    text = "say(os.environ['MASTER_ADDR'], os.environ['MASTER_PORT'])"
    result = jobs.run(text, "--nproc", "1", "--master_addr", "localhost", "--master-port", str(port))
    assert result.text == f"localhost {port}\n"


def test_dry_run_shows_the_command_and_starts_nothing(jobs):
    flags = ("--nproc", "2", "--local_rank", "--dry-run", "--log-dir", "logs")
    result = jobs.run("say('started')", *flags, args=("a b", "--dry-run"), env={"OMP_NUM_THREADS": "3"})
    script = jobs.folder / "script.py"
    assert result.code == 0
    assert result.text == (
        f"{socket.gethostname()}: env OMP_NUM_THREADS=3 PYTHONUNBUFFERED=1 MASTER_ADDR=127.0.0.1 "
        f"'MASTER_PORT=<free port>' WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 RANK=0..1 LOCAL_RANK=0..1 "
        f"{sys.executable} {script} --local_rank=0..1 'a b' --dry-run\n"
    )
    assert [path.name for path in jobs.folder.iterdir()] == ["script.py"]


def test_a_folder_with_a_main_module_is_a_script(jobs):
    (jobs.folder / "job").mkdir()
    jobs.script("say('main', rank)", "job/__main__.py")
    result = jobs.start_command("run", "--nproc", "1", "job").finish()
    assert result.text == "main 0\n"


def test_help_cuts_no_name_at_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = CliRunner().invoke(app, ["--help"]).stdout
    for name in ("--nproc-per-node", "--num_accelerators", "--no_local_rank", "--enable_each_rank_log"):
        assert name in printed
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
