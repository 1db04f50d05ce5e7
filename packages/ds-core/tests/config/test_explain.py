from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ds_core import registry
from ds_core.cli.explanation import as_json, lines
from ds_core.config import Config, catalog
from ds_core.config.explain import Explanation, explain
from ds_core.config.loading import Examined, examine, find_problems
from ds_core.config.origins import Setting
from ds_core.config.paths import nested
from ds_core.config.section import Secret
from ds_core.config.showing import is_secret

CLIENTS = sorted(Path(__file__).with_name("clients").glob("*.json"))
MINE = {
    "batch_from_train": {"train_batch_size": "32", "gradient_accumulation_steps": 2.0},
    "batch_alone": {"train_micro_batch_size_per_gpu": 4},
    "elastic": {
        "elasticity": {"enabled": True, "max_train_batch_size": 64, "micro_batch_sizes": [2, 4], "version": 0.1},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}},
    },
    "deprecated": {
        "train_batch_size": 8,
        "bfloat16": {"enabled": True, "check_overflow": False},
        "zero_optimization": {"stage": 3, "cpu_offload": True, "cpu_offload_param": True, "prefetch_bucket_size": 7},
    },
    "legacy": {"train_batch_size": 8, "zero_optimization": True},
    "null": {"train_batch_size": 8, "fp16": None, "torch_autocast": {"dtype": None}, "steps_per_print": None},
    "plugins": {
        "train_batch_size": 8,
        "checkpoint": {"engine": "sharded", "sharded": {"writers": 4, "retry": {"times": 2}}, "async": {}},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "nesterov": True}},
    },
    "groups": {
        "train_batch_size": 8,
        "compression_training": {
            "weight_quantization": {
                "shared_parameters": {"enabled": False},
                "different_groups": {"wq1": {"params": {"start_bits": 8, "target_bits": 4}, "modules": ["attention"]}},
            }
        },
    },
    "broken": {
        "train_batch_size": "many",
        "gradient_clipping": "strong",
        "zero_optimization": {"stage": 2, "overlapp_comm": True, "leaf_module": {"classes": "A"}},
        "optimizer": {"params": {"lr": 0.1, "betas": [0.9, 0.95]}},
        "fp16": {"enabled": True},
        "bf16": {"enabled": True},
        "zork": {"a": {"b": 1}},
        "wandb": {"enabled": True},
    },
}
WORLDS = [None, 2]
"""Ranks; most of the clients' files have batch sizes for two."""
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@pytest.fixture(autouse=True)
def _strict_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_CONFIG_COMPATIBLE", raising=False)


@pytest.fixture(params=[*MINE, *CLIENTS], ids=lambda case: case if isinstance(case, str) else case.name)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A configuration with every key on a line of its own."""
    raw = MINE[request.param] if isinstance(request.param, str) else json.loads(request.param.read_text())
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(raw, indent=1))
    return path


def of(source: Any, world: int | None = None, **arguments: Any) -> dict[str, Setting]:
    return {setting.path: setting for setting in explain(examine(source, dp_world_size=world, **arguments)).settings}


def origins(source: Any, world: int | None = None) -> dict[str, str]:
    return {path: setting.origin for path, setting in of(source, world).items()}


def leaves(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, (*keys, key))
    else:
        yield keys, value


def said_elsewhere(examined: Examined) -> list[tuple[str | int, ...]]:
    found = [problem.keys or tuple(problem.path.split(".")) for problem in (*examined.problems, *examined.warnings)]
    return [*found, *(row.old for row in examined.renamed)]


@pytest.mark.parametrize("compatible", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_every_key_of_the_file_is_told(file: Path, world: int | None, compatible: bool) -> None:
    examined = examine(file, dp_world_size=world, compatible=compatible)
    explanation = explain(examined)
    lines = {int(number) for setting in explanation.settings for number in re.findall(r"line (\d+)", setting.origin)}
    by_default = [setting.path for setting in explanation.settings if ", for " in setting.origin]
    elsewhere = said_elsewhere(examined)
    for keys, value in leaves(examined.document.raw):
        position = examined.document.position(keys)
        assert position is not None, keys
        assert (
            position[0] in lines
            or any(keys[: len(other)] == other for other in elsewhere)
            # A default has no line; the key may be the older of two names.
            or (value in ("auto", None) and any(path.endswith(keys[-1]) for path in by_default))
            # An empty section is its defaults.
            or (value in ({}, None) and explanation_has(explanation, keys))
        ), keys


def explanation_has(explanation: Explanation, keys: tuple[str, ...]) -> bool:
    return keys[0] in explanation.off or any(setting.keys[: len(keys)] == keys for setting in explanation.settings)


def test_line_numbers_are_right(file: Path) -> None:
    text = file.read_text().splitlines()
    count = 0
    for setting in explain(examine(file, compatible=True)).settings:
        found = re.match(r"line (\d+)", setting.origin)
        if found and "deprecated form" not in setting.origin:
            key = re.match(r'\s*"([^"]+)":', text[int(found[1]) - 1])
            assert key is not None, setting
            assert setting.path.endswith(key[1]) or "deprecated" in setting.origin or is_alias(key[1], setting), setting
            count += 1
    assert count


def is_alias(key: str, setting: Setting) -> bool:
    fields = catalog.all_sections()[str(setting.keys[0])].fields_by_key()
    return fields.get(key, "none") == fields.get(str(setting.keys[-1]))


@pytest.mark.parametrize("world", WORLDS)
def test_values_are_those_of_the_configuration(file: Path, world: int | None) -> None:
    examined = examine(file, dp_world_size=world, compatible=True)
    explanation = explain(examined, all_keys=world is None)
    # What has a problem is left out of the configuration.
    as_written = {group.name for group in explanation.groups if "problem" in group.state}
    has_sizes = world is not None and not any(problem.path in BATCH for problem in examined.problems)
    for setting in explanation.settings:
        if setting.kind == "open" or setting.keys[0] in as_written or (setting.path in BATCH and not has_sizes):
            continue
        if setting.keys[:2] in (("optimizer", "params"), ("scheduler", "params")) and setting.kind == "default":
            continue  # of the constructor, which the configuration does not have
        if setting.path == "checkpoint.engine" and not setting.is_given:
            assert setting.value == examined.config.plugin("checkpoint")
            continue
        value: Any = examined.config
        for depth, key in enumerate(setting.keys):
            if isinstance(value, Mapping) or isinstance(key, int):
                value = value[key]
            else:
                value = value.section(key) if depth == 0 and len(setting.keys) > 1 else getattr(value, str(key))
        assert value == setting.value, setting


@pytest.mark.parametrize("all_keys", [False, True])
def test_what_is_shown_is_a_configuration_with_the_same_values(file: Path, all_keys: bool) -> None:
    world = 2 if find_problems(file, compatible=True) == find_problems(file, dp_world_size=2, compatible=True) else None
    examined = examine(file, dp_world_size=world, compatible=True)
    if examined.problems or "elasticity" in examined.config.sections:
        pytest.skip("not a configuration, or one whose batch sizes must not be written")
    settings = [
        found
        for found in explain(examined, all_keys=all_keys).settings
        if found.value is not None or found.kind != "open"
    ]
    written: dict[str, Any] = {}
    for setting in settings:
        holder = written
        for key in setting.keys[:-1]:
            holder = holder.setdefault(str(key), {})
        holder[str(setting.keys[-1])] = setting.value
    again = examine(json.loads(json.dumps(written)), dp_world_size=world, compatible=False)
    assert [str(problem) for problem in again.problems] == []
    values = {found.path: found.value for found in explain(again, all_keys=all_keys).settings}
    for setting in settings:
        assert json.dumps(values[setting.path]) == json.dumps(setting.value), setting


@pytest.mark.parametrize(
    ("given", "world", "expected"),
    [
        ((32, 4, 2), 4, ("caller", "caller", "caller")),
        ((None, 4, 2), 4, ("derived: 4 x 2 x 4 ranks", "caller", "caller")),
        ((None, 4, None), 1, ("derived: 4 x 1 x 1 rank", "caller", "default")),
        ((32, None, 2), 4, ("caller", "derived: 32 / (2 x 4 ranks)", "caller")),
        ((32, None, None), 4, ("caller", "derived: 32 / 4 ranks", "default")),
        ((32, 4, None), 4, ("caller", "caller", "derived: 32 / (4 x 4 ranks)")),
        ((32, None, None), None, ("caller", "needs --world", "default")),
        ((32, 4, None), None, ("caller", "caller", "needs --world")),
        ((None, 4, 2), None, ("needs --world", "caller", "caller")),
        ((None, None, 2), None, ("needs a number", "needs a number", "caller")),
        ((None, None, None), None, ("needs a number", "needs a number", "needs a number")),
        (("auto", 4, None), None, ("caller, needs a number", "caller", 'waits for "auto"')),
        (("auto", 4, 2), 4, ("caller, needs a number", "caller", "caller")),
        ((31, None, 2), 4, ("caller, has a problem", "see the problems", "caller")),
        ((None, None, None), 4, ("see the problems", "see the problems", "see the problems")),
        ((0, 4, None), None, ("caller, has a problem", "caller", "see the problems")),
    ],
)
def test_batch_sizes(given: tuple[Any, ...], world: int | None, expected: tuple[str, ...]) -> None:
    raw = {key: value for key, value in zip(BATCH, given, strict=True) if value is not None}
    found = of(raw, world)
    assert tuple(found[key].origin for key in BATCH) == expected
    if world and not any("needs" in word or "problem" in word for word in expected):
        train, micro, accumulation = (found[key].value for key in BATCH)
        assert train == micro * accumulation * world


def test_elasticity_chooses_batch_sizes() -> None:
    raw = {
        "train_batch_size": 3,
        "elasticity": {**MINE["elastic"]["elasticity"], "ignore_non_elastic_batch_info": True},
    }
    found = of(raw, 4)
    assert found["train_batch_size"].origin == "derived: elasticity, not caller"
    assert found["gradient_accumulation_steps"].origin == "derived: elasticity"
    sizes = examine(raw, dp_world_size=4).config
    assert found["train_batch_size"].value == sizes.train_batch_size > 3
    assert origins(raw)["train_batch_size"] == "needs --world"


@pytest.mark.parametrize("given", [{}, {"overlap_comm": None}, {"overlap_comm": "auto"}])
def test_overlap_is_derived_from_the_stage(given: dict[str, Any]) -> None:
    setting = of({"zero_optimization": {"stage": 3, **given}})["zero_optimization.overlap_comm"]
    assert (setting.value, setting.kind, setting.origin) == (True, "derived", "derived: stage 3")
    # Below it changes nothing, so it is shown only to who has written it.
    below = of({"zero_optimization": {"stage": 2, **given}}).get("zero_optimization.overlap_comm")
    assert (below is None) == (not given)
    assert below is None or (below.value, below.origin) == (False, "derived: stage 2")


def test_deprecated_keys_say_how_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(MINE["deprecated"], indent=1))
    found = origins(path)
    assert found["zero_optimization.offload_optimizer.device"] == "line 9, as cpu_offload (deprecated)"
    assert found["zero_optimization.stage3_prefetch_bucket_size"] == "line 11"
    assert found["bf16.check_grad_overflow"] == "line 5, as check_overflow (deprecated)"
    assert found["bf16.enabled"] == "line 4, in bfloat16 (deprecated)"
    assert origins(MINE["legacy"])["zero_optimization.stage"] == "caller, in a deprecated form"
    notes = [note for note in explain(examine(path)).notes if note.kind == "deprecated"]
    assert str(notes[0]) == 'bfloat16: deprecated (line 3), write "bf16"'
    assert len(notes) == 4


def test_base64_has_no_lines() -> None:
    text = base64.urlsafe_b64encode(json.dumps({"train_batch_size": 8, "bf16": {"enabled": True}}).encode()).decode()
    assert of(text)["bf16.enabled"] == Setting(("bf16", "enabled"), True, "caller", "base64 text", is_given=True)


def test_arguments_left_out_are_shown_where_the_type_is_known() -> None:
    found = of({"optimizer": {"type": "AdamW", "params": {"lr": 1, "weight_decay": "auto"}}})
    assert found["optimizer.params.lr"] == Setting(("optimizer", "params", "lr"), 1, "caller", "caller", is_given=True)
    assert found["optimizer.params.betas"] == Setting(
        ("optimizer", "params", "betas"), (0.9, 0.999), "default", "default"
    )
    assert found["optimizer.params.weight_decay"].kind == "open"
    assert [path for path in of(MINE["plugins"]) if path.startswith("optimizer.params.")] == [
        "optimizer.params.lr",
        "optimizer.params.nesterov",
    ]
    assert of({"optimizer": {"type": "SGD"}})["optimizer.params"].value == {}


def test_a_broken_section_is_shown_as_written_and_the_others_in_full() -> None:
    explanation = explain(examine(MINE["broken"]))
    states = {group.name: group.state for group in explanation.groups}
    assert states["zero_optimization"] == states["optimizer"] == "has problems; as written"
    assert states["fp16"] == states["bf16"] == ""
    assert states["wandb"] == "has a problem"
    found = {setting.path: setting for setting in explanation.settings}
    assert found["zero_optimization.leaf_module.classes"].value == "A"
    assert found["zero_optimization.overlapp_comm"].origin == "caller, has a problem"
    assert "zero_optimization.reduce_scatter" not in found
    clipping = Setting(("gradient_clipping",), "strong", "open", "caller, has a problem", is_given=True)
    assert found["gradient_clipping"] == clipping
    assert len(explanation.problems) == len(examine(MINE["broken"]).problems) > 5


def test_what_is_misspelt_is_not_shown_under_another_name() -> None:
    raw = {"zero_optimisation": {"stage": 2}, "train_batchsize": 8, "gradient_cliping": 3.5, "stage": 1}
    examined = examine(raw, dp_world_size=2)
    assert examined.problems[0].meant == ("zero_optimization",)
    explanation = explain(examined)
    assert {"zero_optimization", "fp16"} <= {*explanation.off}
    found = {setting.path: setting for setting in explanation.settings}
    assert found["gradient_clipping"] == Setting(("gradient_clipping",), 1.0, "default", "default")
    assert [found[key].value for key in BATCH] == [None, None, None]


def test_a_section_that_is_refused_is_shown_as_it_was_written() -> None:
    explanation = explain(examine({"wandb": {"enabled": True, "project": "mine"}}))
    (group,) = (group for group in explanation.groups if group.name == "wandb")
    assert (group.state, {setting.path: setting.value for setting in group.settings}) == (
        "has a problem",
        {"wandb.enabled": True, "wandb.project": "mine"},
    )


@pytest.mark.parametrize(
    "raw",
    [
        {"comet": {"api_key": "k33p"}},
        {"comet": {"enabled": True, "api_key": "k33p", "project": 3}},
        {"comet": {"api_keyy": "k33p"}},
        {"checkpoint": {"cloud": {"access_token": "k33p", "more": [{"password": "k33p"}]}}},
        {"optimizer": {"type": "Mine", "params": {"api_key": "k33p"}}},
    ],
)
def test_secrets_are_not_shown(raw: dict[str, Any]) -> None:
    explanation = explain(examine(raw), all_keys=True)
    printed = "\n".join(line for line, _ in lines(explanation, 80))
    assert "k33p" not in printed + json.dumps(as_json(explanation))
    assert '"..."' in printed
    assert any(setting.value == "..." for setting in explanation.settings)


def test_what_a_terminal_would_obey_is_not_printed() -> None:
    explanation = explain(examine({"checkpoint": {"cloud": {"a\x1b[2Jb": "c\x9b\x7fd"}}}))
    printed = "".join(line for line, _ in lines(explanation, 80))
    assert printed.isprintable()
    assert "\\u001b[2Jb" in printed


def test_no_declared_key_sounds_like_a_secret_without_being_one() -> None:
    nested_sections = [found for name, model in catalog.all_sections().items() for _, found in nested(model, name)]
    for model in (Config, *nested_sections):
        for key, field in model.fields_by_key().items():
            is_marked = any(isinstance(marker, Secret) for marker in model.model_fields[field].metadata)
            assert is_secret(key) <= is_marked, (model, key)


def test_sections_that_are_off_are_named_and_not_listed() -> None:
    explanation = explain(examine({"train_batch_size": 1, "fp16": {"enabled": False, "hysteresis": 3}}))
    (fp16,) = (group for group in explanation.groups if group.name == "fp16")
    assert (fp16.state, [setting.path for setting in fp16.settings]) == (
        "not enabled",
        ["fp16.enabled", "fp16.hysteresis"],
    )
    names = {group.name for group in explanation.groups} | {*explanation.off}
    assert names == {"", *catalog.all_sections()}


def test_no_section_is_on_that_was_not_given() -> None:
    # Else naming it among those that are off would be wrong.
    on = [
        name
        for name, model in catalog.all_sections().items()
        if name not in ("optimizer", "scheduler", "datastates_ckpt") and model.model_validate({}).is_on()
    ]
    assert on == []


def test_all_keys_lists_everything() -> None:
    explanation = explain(examine({"train_batch_size": 1}), all_keys=True)
    assert {group.name for group in explanation.groups} == {"", *catalog.all_sections()} - {"optimizer", "scheduler"}
    assert explanation.off == ()
    found = {setting.path for setting in explanation.settings}
    assert {"fp16.hysteresis", "flops_profiler.profile_step", "zero_optimization.leaf_module.names"} <= found


LEFT_OUT = [
    ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage3_max_live_parameters", True),
    ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage3_max_live_parameters", False),
    (
        {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": "auto"}},
        "zero_optimization.stage3_max_live_parameters",
        False,
    ),
    ({"zero_optimization": {"stage": 2}}, "zero_optimization.leaf_module.names", True),
    ({"zero_optimization": {"stage": 3}}, "zero_optimization.leaf_module.names", False),
    ({"zero_optimization": {"stage": 3}}, "zero_optimization.round_robin_gradients", True),
    ({}, "dump_state", True),
    ({"dump_state": False}, "dump_state", False),
    ({"dump_state": None}, "dump_state", False),
    ({}, "zero_force_ds_cpu_optimizer", True),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        "zero_force_ds_cpu_optimizer",
        False,
    ),
    ({"optimizer": {"type": "Adam"}}, "optimizer.params.fp32_optimizer_states", True),
    ({"optimizer": {"type": "Adam"}}, "optimizer.params.eps", False),
]


@pytest.mark.parametrize(("raw", "path", "is_left_out"), LEFT_OUT)
def test_defaults_that_change_nothing_are_left_out_unless_asked_for(
    raw: dict[str, Any], path: str, is_left_out: bool
) -> None:
    explanation = explain(examine(raw))
    shown, left_out = ([setting.path for setting in part] for part in (explanation.settings, explanation.left_out))
    assert (path in shown, path in left_out) == (not is_left_out, is_left_out)
    everything = explain(examine(raw), all_keys=True)
    assert list(everything.left_out) == []
    assert {*shown, *left_out} <= {setting.path for setting in everything.settings}


def test_whatever_was_written_is_shown(file: Path) -> None:
    assert [setting for setting in explain(examine(file, compatible=True)).left_out if setting.is_given] == []


def test_a_precision_may_be_on_by_its_type() -> None:
    explanation = explain(examine({"precision": {"type": "bf16"}}))
    assert {group.name: group.state for group in explanation.groups}["bf16"] == ""


LEFT = '"auto" is left here; write values, or let the client that calls initialize fill them in'


@pytest.mark.parametrize(
    ("raw", "note"),
    [
        (
            {"scheduler": {"type": "WarmupLR"}},
            "a scheduler is configured and no optimizer: pass optimizer= to initialize",
        ),
        ({}, "gradients are clipped at norm 1.0, the default; gradient_clipping sets it"),
        ({"disable_allgather": True}, "disable_allgather: no effect: DeepSpeed's engine reads it nowhere either"),
        (
            {"optimizer": {"type": "auto", "params": {"betas": [0.9, "auto"]}}, "train_batch_size": "auto"},
            f"train_batch_size, optimizer.type, optimizer.params.betas: {LEFT}",
        ),
        (
            {"zero_optimization": {"stage": 1}},
            "zero_optimization.stage: initialize needs ds-zero, which is not installed: pip install ds-zero",
        ),
        (
            {"optimizer": {"type": "Lamb"}},
            "optimizer.type: initialize needs ds-kernels, which is not installed: pip install ds-kernels",
        ),
    ],
)
def test_notes(raw: dict[str, Any], note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "names", lambda seam: ())
    monkeypatch.setattr(registry, "version_here", lambda package: None)
    assert note in [str(found) for found in explain(examine(raw)).notes]


def test_a_package_that_is_too_old_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "names", lambda seam: ("1", "2", "plain", "fp32"))
    monkeypatch.setattr(registry, "version_here", lambda package: "0.1.0")
    raw = {"train_batch_size": 1, "gradient_clipping": 0.5, "zero_optimization": {"stage": 3}}
    note = "zero_optimization.stage: initialize needs a later release of ds-zero, installed is 0.1.0"
    assert note in [str(found) for found in explain(examine(raw)).notes]


def test_what_needs_no_word_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "names", lambda seam: ("1", "bf16", "plain", "adamw"))
    raw = {
        "train_batch_size": 1,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        # Its heading says that it is off.
        "fp16": {"enabled": False, "hysteresis": 4},
        "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "WarmupLR"},
        "zero_optimization": {"stage": 1},
    }
    assert explain(examine(raw)).notes == ()


LEFT_OUT = 'checkpoint.engine: left out, it is "sharded" where ds-ckpt is installed, else "plain"'
NEEDED = "checkpoint.writer.decoupled: initialize needs ds-ckpt, which is not installed: pip install ds-ckpt"


@pytest.mark.parametrize(
    ("given", "installed", "value", "kind", "origin", "note"),
    [
        ({}, ("plain",), "plain", "default", "default", LEFT_OUT),
        ({}, ("plain", "sharded"), "sharded", "default", "default", LEFT_OUT),
        ({"engine": None}, ("plain",), "plain", "default", "default, for null", LEFT_OUT),
        ({"engine": "auto"}, ("plain", "sharded"), "sharded", "default", 'default, for "auto"', LEFT_OUT),
        ({"engine": "plain"}, ("plain", "sharded"), "plain", "caller", "caller", ""),
        (
            {"writer": {"decoupled": True}},
            ("plain",),
            "async",
            "derived",
            "derived: checkpoint.writer.decoupled",
            NEEDED,
        ),
        (
            {"engine": None, "writer": {"decoupled": True}},
            ("plain", "async"),
            "async",
            "derived",
            "derived: checkpoint.writer.decoupled",
            "",
        ),
        (
            {"engine": "plain", "writer": {"decoupled": True}},
            ("plain",),
            "plain",
            "caller",
            "caller",
            "checkpoint.writer.decoupled: no effect: checkpoint.engine is given",
        ),
    ],
)
def test_the_engine_of_checkpoints(
    given: dict[str, Any],
    installed: tuple[str, ...],
    value: str,
    kind: str,
    origin: str,
    note: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "names", lambda seam: installed if seam == "checkpoint" else ())
    monkeypatch.setattr(registry, "version_here", lambda package: None)
    explanation = explain(examine({"train_batch_size": 1, "checkpoint": {"tag_validation": "Fail", **given}}))
    [setting] = [setting for setting in explanation.settings if setting.path == "checkpoint.engine"]
    assert (setting.value, setting.kind, setting.origin) == (value, kind, origin)
    assert [str(found) for found in explanation.notes if found.path.startswith("checkpoint.")] == [note] * bool(note)


def test_what_compatibility_mode_drops_is_a_note_and_no_value() -> None:
    raw = {"train_batch_size": 1, "msamp": {"enabled": True}, "zero_optimization": {"offload_param": {"device": "cpu"}}}
    explanation = explain(examine(raw, compatible=True))
    assert [(note.path, note.kind) for note in explanation.notes][:2] == [
        ("msamp", "ignored"),
        ("zero_optimization.offload_param", "ignored"),
    ]
    assert not [
        setting
        for setting in explanation.settings
        if "msamp" in setting.path or (setting.keys[-1] == "offload_param" and setting.value)
    ]
