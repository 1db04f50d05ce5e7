"""What DeepSpeed wrote goes on at stages 1 and 2, on any number of ranks, and what is saved there is exported right."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import ds_core
from ds_ckpt.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint, load_state_dict_from_zero_checkpoint
from ds_core.interfaces.logical import MASTER, WEIGHT
from ds_core.testing.anywhere import in_world
from ds_core.testing.going_on import Held, held, whole
from ds_core.testing.ranks import run_ranks

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor


def _of_stage_0() -> ModuleType:
    # Tests are no package (--import-mode=importlib), so a file of another folder is loaded by its path.
    path = Path(__file__).parents[1] / "packages/ds-ckpt/tests/integration/test_deepspeed_engine.py"
    spec = importlib.util.spec_from_file_location("deepspeed_resumes_at_stage_0", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


stage_0 = _of_stage_0()
"""The fixtures, their model and data, and plain PyTorch that goes on from them."""
PLACES = [(stage, world) for stage in (1, 2) for world in (1, 2, 3)]
NAMES = [case.name for case in stage_0.CASES]
WRITTEN = 4
"""Steps in a fixture."""


def about(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stage_0.FIXTURES / name / "expected.json").read_text())
    return found


def go_on(stage: int, name: str, folder: Path) -> list[Held]:
    """Load a fixture, train on and save; runs on every rank, and returns what it had after loading and at the end."""
    world, rank = dist.get_world_size(), dist.get_rank()
    fixture = about(name)
    # The user's own file, with another stage.
    config = copy.deepcopy(fixture["config"])
    config["train_micro_batch_size_per_gpu"] = stage_0.SAMPLES // world
    config["zero_optimization"] = {"stage": stage}
    torch.manual_seed(1)
    engine, *_ = ds_core.initialize(model=stage_0.Plain(), config=config)
    path, client_state = engine.load_checkpoint(stage_0.FIXTURES / name)
    assert path == str(stage_0.FIXTURES / name / "global_step4")
    assert client_state == {"epoch": 2, "note": "fixture", "ds_version": fixture["deepspeed"]}
    found = [held(engine)]
    for step in range(stage_0.STEPS):
        x, target = (part.chunk(world)[rank] for part in stage_0.batch(step))
        engine.backward(stage_0.loss_of(engine(x), target))
        engine.step()
    assert engine.global_steps == WRITTEN + stage_0.STEPS
    engine.save_checkpoint(folder)
    assert engine.save_16bit_model(folder, "pytorch_model.bin")
    engine.parts.checkpoint.commit()
    found.append(held(engine))
    engine.destroy()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def folder_of(folder: Path, name: str, stage: int, world: int) -> Path:
    return folder / f"{name}, stage {stage} on {world}"


@pytest.fixture(scope="module")
def gone_on(folder: Path) -> dict[tuple[str, int, int], list[list[Held]]]:
    """Everything in one spawn: (fixture, stage, world size) -> what each rank had."""
    worlds = sorted({world for _, world in PLACES})
    keys = [[(name, stage, world) for stage, to in PLACES if to == world for name in NAMES] for world in worlds]
    jobs = [
        [partial(go_on, stage, name, folder_of(folder, name, stage, world)) for name, stage, world in of_world]
        for of_world in keys
    ]
    functions = [partial(in_world, world, job) for world, job in zip(worlds, jobs, strict=True)]
    found = {}
    for of_world, by_rank in zip(keys, run_ranks(functions, max(worlds), timeout_s=200), strict=True):
        for at, key in enumerate(of_world):
            found[key] = [by_rank[rank][at] for rank in range(key[2])]
    return found


def tensors_of(ranks: list[Held]) -> dict[tuple[str, str], Tensor]:
    """Return whole tensors by (name, kind); a master has the digits of a weight that has none."""
    problems: list[str] = []
    found = {(key.split(" ")[1], key.split(" ")[0]): value for key, value in whole(ranks, problems, "held").items()}
    assert problems == []
    return {**{(name, MASTER): value for (name, kind), value in found.items() if kind == WEIGHT}, **found}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_deepspeed_had(name: str, gone_on: dict[tuple[str, int, int], list[list[Held]]]) -> None:
    fixture = about(name)
    expected = load_file(stage_0.FIXTURES / name / "expected.safetensors")
    for stage, world in PLACES:
        by_rank = [of_rank[0] for of_rank in gone_on[name, stage, world]]
        found = tensors_of(by_rank)
        for key, value in expected.items():
            of, kind = key.split("|")
            assert torch.equal(found[of, {"fp32": MASTER}.get(kind, kind)], value), f"stage {stage} on {world}: {key}"
        assert all(value.item() == WRITTEN for (_, kind), value in found.items() if kind == "step")
        for of_rank in by_rank:
            (group,) = of_rank.numbers["groups"]
            assert ([group["lr"]], group["betas"], group["weight_decay"]) == (fixture["lr_after"], (0.9, 0.98), 0.01)
            assert of_rank.numbers["schedule"] == {"last_batch_iteration": 3}
            counters = [of_rank.numbers[key] for key in ("global_steps", "skipped_steps", "global_samples")]
            assert counters == [WRITTEN, 0, 16 * fixture["world"]]


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_as_plain_pytorch(name: str, gone_on: dict[tuple[str, int, int], list[list[Held]]]) -> None:
    expected = stage_0.reference(stage_0.FIXTURES / name, about(name))
    before = load_file(stage_0.FIXTURES / name / "expected.safetensors")
    for stage, world in PLACES:
        found = tensors_of([of_rank[1] for of_rank in gone_on[name, stage, world]])
        for key, value in expected.items():
            master = found[key, MASTER]
            torch.testing.assert_close(master, value, rtol=0, atol=stage_0.TOLERANCE[about(name)["dtype"]])
            # The steps are seen: an update moves weights by about the rate.
            assert (master - before[f"{key}|fp32"]).abs().max() > stage_0.LR / 10


@pytest.mark.parametrize("name", NAMES)
def test_consolidated_weights_are_the_masters(
    name: str, folder: Path, gone_on: dict[tuple[str, int, int], list[list[Held]]]
) -> None:
    for stage, world in PLACES:
        saved = folder_of(folder, name, stage, world)
        found = tensors_of([of_rank[1] for of_rank in gone_on[name, stage, world]])
        masters = {key: value for (key, kind), value in found.items() if kind == MASTER}
        consolidated = get_fp32_state_dict_from_zero_checkpoint(str(saved))
        assert masters.keys() == consolidated.keys() - {"scale"}
        exported = torch.load(saved / "pytorch_model.bin", weights_only=True)
        loaded = load_state_dict_from_zero_checkpoint(stage_0.Plain(), str(saved)).state_dict()
        for key, master in masters.items():
            assert torch.equal(consolidated[key], master), f"stage {stage} on {world}: {key}"
            assert torch.equal(loaded[key], master)
            assert torch.equal(exported[key], found[key, WEIGHT])
            assert torch.equal(exported[key], master.to(exported[key].dtype))
