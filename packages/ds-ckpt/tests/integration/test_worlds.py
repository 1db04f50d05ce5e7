"""Engines that save with ``sharded``: the same bits at another world size, the same run at the same one."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ds_core import comm
from ds_core.testing.ranks import run_ranks
from ds_core.testing.resume import ResumeModel, everything, start, train, unequal

if TYPE_CHECKING:
    from pathlib import Path

# Files and chunks so small that this model has many of both, and chunks end inside its tensors.
SHARDED = {"checkpoint": {"engine": "sharded", "sharded": {"writers": 2, "chunk_bytes": 96}}}
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}}
if importlib.util.find_spec("ds_fp16") is not None:
    PRECISIONS["fp16"] = {"fp16": {"enabled": True, "initial_scale_power": 8}}
    PRECISIONS["bf16"] = {"bf16": {"enabled": True}}
WORLDS = [(1, 2), (2, 1), (2, 3), (3, 2)]


def begin(precision: str, seed: int, engine: str = "sharded"):
    """Return an engine whose model has tied, frozen and zero-size parameters, trained in two groups."""
    torch.manual_seed(seed)
    model = ResumeModel(0.3)
    decayed = [param for param in model.parameters() if param.requires_grad and param.dim() > 1]
    others = [param for param in model.parameters() if param.requires_grad and param.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "lr": 0.01}, {"params": others, "weight_decay": 0.0, "lr": 0.02}], lr=0.01
    )
    checkpoint = SHARDED if engine == "sharded" else {"checkpoint": {"engine": engine}}
    return start({**checkpoint, **PRECISIONS[precision]}, seed=seed, model=model, optimizer=optimizer)


def state_of(engine) -> dict[str, Any]:
    found = everything(engine)
    # A batch of another world is another number of samples.
    return {key: value for key, value in found.items() if key not in ("counters", "in window")}


def save(folder: Path, precision: str, engine: str = "sharded") -> dict[str, Any]:
    running = begin(precision, seed=0, engine=engine)
    train(running, 6)
    running.save_checkpoint(folder, tag="tag", client_state={"world": comm.get_world_size(), "key": (1, {2: 3})})
    return state_of(running)


def load(folder: Path, precision: str, engine: str = "sharded") -> tuple[dict[str, Any], dict[str, Any], list[float]]:
    running = begin(precision, seed=5, engine=engine)
    _, client_state = running.load_checkpoint(folder)
    loaded = state_of(running)
    return loaded, client_state, train(running, 3)


@pytest.mark.parametrize(("saved_by", "loaded_by"), WORLDS)
def test_another_world_size_loads_the_same_bits(saved_by, loaded_by, tmp_path):
    saved = run_ranks([partial(save, tmp_path / name, name) for name in PRECISIONS], saved_by, timeout_s=60)
    loaded = run_ranks([partial(load, tmp_path / name, name) for name in PRECISIONS], loaded_by, timeout_s=60)
    for expected, found in zip(saved, loaded, strict=True):
        for state, client_state, losses in found:
            assert unequal(state, expected[0]) == []
            assert client_state == {"world": saved_by, "key": (1, {2: 3})}
            assert all(loss == loss for loss in losses)


def save_and_go_on(folder: Path, precision: str) -> tuple[list[float], dict[str, Any]]:
    running = begin(precision, seed=0)

    def save_once(engine) -> None:
        if engine.micro_steps == 4:  # inside a window of 3: unfinished gradients are saved, too
            engine.save_checkpoint(folder, tag="tag")

    losses = train(running, 12, after_each=save_once)
    return losses[4:], everything(running)


def resume(folder: Path, precision: str) -> tuple[list[float], dict[str, Any]]:
    running = begin(precision, seed=9)
    running.load_checkpoint(folder)
    return train(running, 8), everything(running)


@pytest.mark.parametrize("world_size", [1, 2])
def test_at_the_same_world_size_it_is_the_same_run(world_size, tmp_path):
    functions = [
        partial(function, tmp_path / name, name) for name in PRECISIONS for function in (save_and_go_on, resume)
    ]
    results = run_ranks(functions, world_size, timeout_s=60)
    for expected, found in zip(results[::2], results[1::2], strict=True):
        for (losses, state), (losses_again, state_again) in zip(expected, found, strict=True):
            assert losses_again == losses
            assert unequal(state_again, state) == []


def test_what_the_core_wrote_is_loaded(tmp_path):
    [saved] = run_ranks([partial(save, tmp_path, "fp32", "plain")], 2)
    [loaded] = run_ranks([partial(load, tmp_path, "fp32", "sharded")], 3)
    for state, _, _ in loaded:
        assert unequal(state, saved[0]) == []


def test_ranks_write_about_equal_shares_of_many_files(tmp_path):
    run_ranks([partial(save, tmp_path, "fp32")], 3)
    folder = tmp_path / "tag"
    manifest = json.loads((folder / "checkpoint.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == sorted(["checkpoint.json", *manifest["files"]])
    list(manifest["files"].items())
    by_rank = [
        sum(
            row["bytes"] - row["header"][0]
            for name, row in manifest["files"].items()
            if name.startswith(f"rank_0000{r}")
        )
        for r in range(3)
    ]
    assert len(manifest["files"]) == 6
    # The largest tensor is 13 x 13 of 4 bytes, and written by one.
    assert max(by_rank) - min(by_rank) <= 2 * 13 * 13 * 4
    assert min(by_rank) > 0
    names = {row["name"] for row in manifest["tensors"]}
    assert "tied.weight" not in names, "tied weights are stored once"
    assert {"inner.weight", "frozen.weight", "empty", "count"} <= names
