"""``ds config``. The goldens are what people see at 80 columns; ``DS_UPDATE_GOLDEN=1 pytest ...`` rewrites them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ds_core import registry
from ds_core.cli.config import app
from ds_core.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "config" / "golden"
CASES = {
    "transformers_world_4": ["transformers.json", "--world", "4"],
    "transformers": ["transformers.json"],
    "auto": ["auto.json"],
    "deprecated": ["deprecated.json", "--world", "2"],
    "broken": ["broken.json", "--world", "2"],
    "compatible": ["compatible.json", "--world", "2", "--compatible"],
}
"""Golden file -> arguments of ``ds config explain``."""
PLUGINS = {"precision": ("fp32", "bf16", "fp16"), "optimizer": ("adam", "adamw"), "checkpoint": ("plain",)}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same plugins wherever the test runs."""
    monkeypatch.setattr(registry, "names", lambda seam: PLUGINS.get(seam, ()))
    monkeypatch.setattr(registry, "version_here", lambda package: None)


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_CONFIG_COMPATIBLE", raising=False)
    monkeypatch.setenv("COLUMNS", "80")


def ds_config(*arguments: str) -> Result:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", CASES)
def test_explain_prints_the_golden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    printed = ds_config("explain", *CASES[name]).stdout
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("DS_UPDATE_GOLDEN"):
        golden.write_text(printed)
        pytest.skip(f"{golden.name} was rewritten")
    assert printed == golden.read_text()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("width", [60, 80, 200])
def test_lines_fit_and_nothing_is_cut(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    as_json = json.loads(ds_config("explain", *CASES[name], "--json").stdout)
    monkeypatch.setenv("COLUMNS", str(width))
    printed = ds_config("explain", *CASES[name]).stdout
    _, _, table = printed.partition("\n\n")
    assert max(len(line) for line in table.splitlines()) <= width
    words = re.sub(r"\s", "", table)
    for setting in as_json["settings"]:
        value = json.dumps(setting["value"], ensure_ascii=False)
        is_blank = setting["kind"] == "open" and setting["value"] is None
        # A row that is folded has its columns interleaved; each cell is there for itself.
        assert is_blank or re.sub(r"\s", "", value) in words, setting
        for word in setting["origin"].split():
            assert word in words, setting
    for note in as_json["notes"]:
        assert re.sub(r"\s", "", note["text"]) in words


@pytest.mark.usefixtures("installed")
def test_explain_as_json() -> None:
    result = ds_config("explain", str(GOLDEN / "transformers.json"), "--world", "4", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["ok"], found["problems"]) == (0, True, [])
    settings = {setting["path"]: setting for setting in found["settings"]}
    assert settings["train_batch_size"] == {
        "path": "train_batch_size",
        "value": 32,
        "kind": "derived",
        "origin": "derived: 4 x 2 x 4 ranks",
    }
    assert "aio" in found["off"]
    assert "zero_optimization.sub_group_size" in found["left_out"]
    assert "zero_optimization.sub_group_size" not in settings
    assert {"kind": "package", "path": "zero_optimization.stage"}.items() <= found["notes"][-1].items()


def test_explain_all_lists_every_section() -> None:
    found = json.loads(ds_config("explain", str(GOLDEN / "transformers.json"), "--all", "--json").stdout)
    assert (found["off"], found["left_out"]) == ([], [])
    assert "flops_profiler.profile_step" in [setting["path"] for setting in found["settings"]]


def test_explain_has_no_infinity_in_json(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text('{"checkpoint": {"sharded": {"limit": Infinity}}}')
    printed = ds_config("explain", str(path), "--json").stdout
    settings = json.loads(printed, parse_constant=pytest.fail)["settings"]
    assert [setting["value"] for setting in settings if setting["path"] == "checkpoint.sharded.limit"] == ["Infinity"]


def test_check_says_what_a_good_file_is() -> None:
    path = str(GOLDEN / "transformers.json")
    assert (ds_config("check", path).stdout, ds_config("check", path).exit_code) == (
        f"{path}: ok: ZeRO stage 2, bf16, AdamW, WarmupLR\n",
        0,
    )
    assert ds_config("check", path, "--world", "4").stdout == (
        f"{path}: ok: ZeRO stage 2, bf16, AdamW, WarmupLR, batch 32 = 4 x 2 x 4\n"
    )


def test_check_lists_the_problems_of_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.json").write_text('{"train_batch_size": 1}')
    Path("bad.json").write_text('{\n  "fp16": {"enabld": true},\n  "zero_optimisation": {"stage": 2}\n}')
    result = ds_config("check", "good.json", "bad.json", "zzz")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "good.json: ok: ZeRO stage 0, fp32, no optimizer",
        "bad.json:2:12: fp16.enabld: unknown key (its value is true)",
        '  fix: did you mean "enabled"?',
        'bad.json:3:3: zero_optimisation: unknown key (its value is {"stage": 2})',
        '  fix: did you mean "zero_optimization"?',
        "bad.json: 2 problems",
        "zzz: file not found: zzz",
        f"  where: working directory {tmp_path}",
        "  fix: check the path",
    ]


def test_check_as_json(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{\n  "gradient_cliping": 1,\n  "bfloat16": {"enabled": true}\n}')
    result = ds_config("check", str(path), str(path.with_name("none.json")), "--json")
    bad, missing = json.loads(result.stdout)
    assert result.exit_code == 1
    assert bad == {
        "file": str(path),
        "ok": False,
        "is": None,
        "problems": [
            {
                "path": "gradient_cliping",
                "text": "unknown key (its value is 1)",
                "fix": 'did you mean "gradient_clipping"?',
                "line": 2,
                "column": 3,
            }
        ],
        "warnings": [],
        "deprecated": [{"path": "bfloat16", "text": 'write "bf16"', "line": 3, "column": 3}],
        "hints": [],
        "notes": [],
    }
    assert missing["problems"][0]["text"].startswith("file not found")
    assert missing.keys() == bad.keys()


@pytest.mark.parametrize("command", ["check", "explain"])
def test_what_is_wrong_with_the_environment_is_no_problem_of_a_file(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_CONFIG_COMPATIBLE", "maybe")
    result = CliRunner().invoke(app, [command, str(GOLDEN / "auto.json")])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.where == "environment variable DS_CONFIG_COMPATIBLE"
    assert result.stdout == ""
    assert ds_config(command, str(GOLDEN / "auto.json"), "--strict").exit_code == 0


def test_problems_of_keys_that_are_not_there_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('{\n  "fp16": {"enabld": true}\n}')
    lines = ds_config("check", "bad.json", "--world", "2").stdout.splitlines()
    assert lines[0].startswith("bad.json:2:12: fp16.enabld")
    assert lines[2].startswith("bad.json: train_batch_size")


def test_at_most_a_hundred_problems_of_a_file_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text(
        json.dumps({"zork": {}, "optimizer": {"type": "SGD", **{f"zork{index}": 1 for index in range(120)}}})
    )
    for command in ("check", "explain"):
        result = ds_config(command, "bad.json")
        lines = result.stdout.splitlines()
        # Two lines each: what is wrong, and how to fix it.
        assert len([line for line in lines if "unknown key" in line]) == 100, command
        assert "bad.json: and 21 more" in lines
        assert "bad.json: 121 problems" in lines
    (as_json,) = json.loads(ds_config("check", "bad.json", "--json").stdout)
    assert len(as_json["problems"]) == 121


def test_auto_under_world_has_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = {
        "train_batch_size": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": ["auto", 0.9]}},
    }
    Path("auto.json").write_text(json.dumps(raw))
    hint = '3 values are "auto": leave out --world if the client that calls initialize fills them in'
    assert ds_config("check", "auto.json", "--world", "2").stdout.splitlines()[-1] == f"  hint: {hint}"
    assert json.loads(ds_config("check", "auto.json", "--world", "2", "--json").stdout)[0]["hints"] == [hint]
    assert "hint" not in ds_config("check", "auto.json").stdout
    Path("auto.json").write_text(json.dumps({"train_batch_size": 2, "fp16": {"zork": "auto"}}))
    result = ds_config("check", "auto.json", "--world", "2")
    assert (result.exit_code, "hint" in result.stdout) == (1, False)


@pytest.mark.parametrize(("arguments", "variable"), [(["--compatible"], None), ([], "1")])
def test_compatibility_mode_is_an_option_and_a_variable(
    arguments: list[str], variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv("DS_CONFIG_COMPATIBLE", variable)
    path = str(GOLDEN / "compatible.json")
    result = ds_config("check", path, *arguments)
    assert result.exit_code == 0
    assert f'{path}:8:3: ignored in compatibility mode: msamp: unknown key (its value is {{"enabled": false}})' in (
        result.stdout.splitlines()
    )
    assert ds_config("check", path, "--strict").exit_code == 1


def test_deprecated_keys_are_shown_and_are_no_problem() -> None:
    path = str(GOLDEN / "deprecated.json")
    result = ds_config("check", path)
    assert result.exit_code == 0
    assert f'{path}:5:3: bfloat16: deprecated, write "bf16"' in result.stdout.splitlines()


@pytest.mark.parametrize("command", ["check", "explain"])
def test_a_world_without_ranks_is_wrong_usage(command: str) -> None:
    assert ds_config(command, str(GOLDEN / "auto.json"), "--world", "0").exit_code == 2


@pytest.mark.parametrize("command", ["check", "explain"])
def test_it_works_without_torch(command: str, site: Any) -> None:
    site.module("torch", "raise ImportError('torch was imported')")
    done = site.ds("config", command, str(GOLDEN / "transformers.json"), "--world", "4")
    assert done.returncode == 0, done.stderr
    done = site.ds("config", command, str(GOLDEN / "broken.json"), "--world", "4")
    assert (done.returncode, done.stderr) == (1, "")
    assert "zero_optimisation" in done.stdout


@pytest.fixture
def engines(site: Any) -> Any:
    """A package of engines: one needs torch to be imported, the others do not, one of which cannot be imported."""
    section = "from ds_core.config import PositiveInt, Section\nclass Options(Section):\n    threads: PositiveInt = 1\n"
    engine = "class Engine:\n    Config = Options\n"
    site.module("light", section + engine)
    site.module("heavy", f"try:\n    import torch\nexcept ImportError:\n    pass\n{section}{engine}")
    site.module("broken", "import no_such_module")
    entries = {"light_one": "light:Engine", "heavy_one": "heavy:Engine", "broken_one": "broken:Engine"}
    site.distribution("ds-engines", entries, seam="checkpoint")
    return site


def checked(site: Any, **section: Any) -> list[str]:
    path = site.folder / "ds.json"
    path.write_text(json.dumps({"checkpoint": section}))
    lines = site.ds("config", "check", str(path)).stdout.splitlines()
    return [line.replace(f"{path}", "ds.json") for line in lines]


OK = "ds.json: ok: ZeRO stage 0, fp32, no optimizer"


def test_check_holds_options_against_the_class_of_the_chosen_plugin(engines: Any) -> None:
    assert checked(engines, engine="light_one", light_one={"threads": 2}) == [OK]
    assert checked(engines, engine="light_one", light_one={"treads": 2}) == [
        "ds.json:1:54: checkpoint.light_one.treads: unknown key (its value is 2)",
        '  fix: did you mean "threads"?',
    ]


def test_check_says_so_where_options_stay_unchecked(engines: Any) -> None:
    assert checked(engines, engine="heavy_one") == [OK]
    ok, note = checked(engines, engine="heavy_one", heavy_one={"treads": 2})
    needs = "asking ds-engines needs torch; initialize checks them"
    assert (ok, note) == (OK, f"  note: checkpoint.heavy_one: unchecked: {needs}")
    ok, note = checked(engines, engine="elsewhere", elsewhere={"treads": 2})
    needs = 'initialize needs a package that brings the checkpoint "elsewhere", and none is installed here'
    assert (ok, note) == (
        OK,
        f"  note: checkpoint.engine: {needs}; the options in checkpoint.elsewhere are unchecked",
    )


def test_check_names_a_plugin_that_cannot_be_imported(engines: Any) -> None:
    first, fix = checked(engines, engine="broken_one", broken_one={"treads": 2})
    assert first.startswith("ds.json:1:17: checkpoint.engine: the plugin cannot be imported: No module named")
    assert "reinstall ds-engines" in fix


def test_explain_tells_problems_and_gaps_of_options_too(engines: Any) -> None:
    path = engines.folder / "ds.json"
    for name, words in (("light_one", "did you mean"), ("heavy_one", "checkpoint.heavy_one: unchecked")):
        path.write_text(json.dumps({"checkpoint": {"engine": name, name: {"treads": 2}}}))
        assert words in engines.ds("config", "explain", str(path)).stdout


@pytest.fixture
def partitions(site: Any) -> Any:
    """A package of partitions: two refuse clipping, in other words, one needs torch, one cannot be imported."""
    refuse = (
        "from ds_core.errors import ConfigError\n"
        "class Refuses:\n"
        "    Config = None\n"
        "    text = '{text}'\n"
        "    @classmethod\n"
        "    def check_config(cls, config):\n"
        "        if config.gradient_clipping:\n"
        "            raise ConfigError(cls.text, where=config.where, fix='set it to 0')\n"
    )
    section = "zero_optimization.overlap_comm: got true, and gradients are clipped"
    site.module("refuses", refuse.format(text=section))
    site.module("refuses_it_all", refuse.format(text="gradients: they are clipped"))
    site.module("heavy", "import torch")
    site.module("broken", "import no_such_module")
    entries = {"one": "refuses:Refuses", "all": "refuses_it_all:Refuses", "heavy": "heavy:P", "broken": "broken:P"}
    site.distribution("ds-parts", entries, seam="partition")
    return site


def partition_checked(site: Any, name: str, **keys: Any) -> list[str]:
    path = site.folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"overlap_comm": True}, "partition": {"type": name}, **keys}))
    return [line.replace(f"{path}", "ds.json") for line in site.ds("config", "check", str(path)).stdout.splitlines()]


def test_check_asks_the_partition_what_it_refuses(partitions: Any) -> None:
    ok = "ds.json: ok: {}, fp32, no optimizer"
    assert partition_checked(partitions, "one", gradient_clipping=0) == [ok.format("one")]
    assert partition_checked(partitions, "one") == [
        "ds.json:1:24: zero_optimization.overlap_comm: got true, and gradients are clipped",
        "  fix: set it to 0",
    ]
    # The text begins with no key, so it is told at the one that asks for the partition.
    assert partition_checked(partitions, "all") == [
        "ds.json:1:61: partition.type: gradients: they are clipped",
        "  fix: set it to 0",
    ]
    assert partition_checked(partitions, "heavy") == [
        ok.format("heavy"),
        "  note: partition.type: unchecked: asking ds-parts needs torch; initialize asks it what it refuses",
    ]
    # Told once, although it is asked for its options, too.
    lines = partition_checked(partitions, "broken", partition={"type": "broken", "broken": {"a": 1}})
    assert [line for line in lines if "cannot be imported" in line] == lines[:1]
    # Where the section has problems, its values are not what was meant.
    (line, _) = partition_checked(partitions, "one", zero_optimization={"overlap_com": True})
    assert "unknown key" in line


@pytest.mark.usefixtures("installed")
def test_check_names_the_package_that_is_not_installed_here(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"checkpoint": {"writer": {"decoupled": true}, "sharded": {"keep_last": 2}}}')
    result = ds_config("check", str(path))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1:] == [
        "  note: checkpoint.writer.decoupled: initialize needs ds-ckpt, which is not installed: pip install ds-ckpt",
        '  note: checkpoint.sharded: not read: "async" is in force, and its options are those in "checkpoint.async"',
    ]


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage"),
        ({"partition": {"type": "3", "3": {"x": 1}}}, "partition.type"),
    ],
)
def test_check_says_what_the_installed_release_cannot_do(
    raw: dict[str, Any], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = {**PLUGINS, "partition": ("1", "2", "replicated")}
    monkeypatch.setattr(registry, "names", lambda seam: plugins.get(seam, ()))
    monkeypatch.setattr(registry, "version_here", {"ds-zero": "0.1.0"}.get)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(raw))
    result = ds_config("check", str(path))
    assert result.exit_code == 0
    (note,) = [line for line in result.stdout.splitlines() if "note: " in line]
    assert note.startswith(f"  note: {key}: initialize needs a later release of ds-zero, installed is 0.1.0")
