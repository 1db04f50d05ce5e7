"""Stopping and resuming: bit for bit at the same world size, the same tensors at another."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import ds_core
from ds_core import comm
from ds_core.testing.ranks import run_ranks

MICRO_STEPS = 10
ACCUMULATION = 2


class Dropped(torch.nn.Module):
    """Uses the random generator in forward, has a buffer that changes, and sizes no world divides."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(5, 13)
        self.norm = torch.nn.BatchNorm1d(13)
        self.outer = torch.nn.Linear(13, 1)
        self.frozen = torch.nn.Linear(13, 13).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.dropout(self.norm(self.inner(x)), 0.3, self.training)
        return self.outer(hidden + self.frozen(hidden)).pow(2).mean()


def start(seed: int, accumulation: int = ACCUMULATION, samples: int = 60):
    torch.manual_seed(seed)
    data = torch.randn(samples, 5, generator=torch.Generator().manual_seed(3))
    engine, _, loader, _ = ds_core.initialize(
        model=Dropped(),
        training_data=data,
        config={
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": accumulation,
            "checkpoint": {"engine": "plain"},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {"warmup_num_steps": 2, "total_num_steps": 5, "warmup_min_lr": 0.001, "warmup_max_lr": 0.01},
            },
        },
    )
    torch.manual_seed(100 + comm.get_rank())
    return engine, loader


def batches(loader):
    while True:
        yield from loader


def run(engine, loader, count: int, save_to: Path | None = None) -> list[float]:
    losses = []
    stream = batches(loader)
    for _ in range(count):
        loss = engine(next(stream))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if save_to is not None:
            engine.save_checkpoint(save_to, tag=f"micro{engine.micro_steps}", client_state={"at": engine.micro_steps})
    return losses


def everything(engine) -> dict[str, torch.Tensor]:
    found = {f"weight {name}": value.clone() for name, value in engine.module_state_dict().items()}
    for name, param in engine.module.named_parameters():
        for slot, value in engine.optimizer.state.get(param, {}).items():
            found[f"{slot} {name}"] = value.clone()
    return found


def resumed_runs_that_differ(folder: Path) -> list[str]:
    """Save after every micro-step; resume from each in a fresh engine; return where it is not the same run."""
    # 24 samples: the run goes through several epochs, whose order differs.
    engine, loader = start(seed=0, samples=24)
    losses = run(engine, loader, MICRO_STEPS, folder)
    expected, lr = everything(engine), engine.get_lr()
    found = []
    # Each rank's batch norm has seen its own data; a checkpoint holds rank 0's.
    names = [name for name in expected if comm.get_rank() == 0 or "running" not in name]
    for at in range(1, MICRO_STEPS):
        engine, loader = start(seed=at, samples=24)
        path, client_state = engine.load_checkpoint(folder, tag=f"micro{at}")
        assert Path(path) == folder / f"micro{at}"
        assert client_state == {"at": at}
        assert engine.micro_steps == at
        assert engine.global_steps == at // ACCUMULATION
        again = run(engine, loader, MICRO_STEPS - at)
        if again != losses[at:]:
            found.append(f"from {at}: losses {again} instead of {losses[at:]}")
        now = everything(engine)
        found += [f"from {at}: {name}" for name in names if not torch.equal(now[name], expected[name])]
        if engine.get_lr() != lr:
            found.append(f"from {at}: lr {engine.get_lr()} instead of {lr}")
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_at_any_micro_step_it_is_the_same_run_bit_for_bit(world_size, tmp_path):
    [results] = run_ranks([partial(resumed_runs_that_differ, tmp_path)], world_size, timeout_s=120)
    assert results == [[]] * world_size


def save_two_steps(folder: Path) -> dict[str, torch.Tensor]:
    engine, loader = start(seed=0)
    run(engine, loader, 2 * ACCUMULATION)
    engine.save_checkpoint(folder)
    return everything(engine)


def load_and_go_on(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, int], list[float]]:
    engine, loader = start(seed=5)
    engine.load_checkpoint(folder)
    loaded = everything(engine)
    position = loader.state_dict()
    return loaded, position, run(engine, loader, 2)


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(1, 2), (2, 1), (2, 3), (3, 2), (4, 1), (1, 4)])
def test_another_world_size_loads_the_same_bits(saved_by, loaded_by, tmp_path):
    [saved] = run_ranks([partial(save_two_steps, tmp_path)], saved_by)
    [loaded] = run_ranks([partial(load_and_go_on, tmp_path)], loaded_by)
    for tensors, position, losses in loaded:
        assert all(torch.equal(tensors[name], saved[0][name]) for name in saved[0])
        assert position["consumed_samples"] == 4 * 3 * saved_by
        assert all(loss == loss for loss in losses)


def load_in_a_window(folder: Path) -> str:
    engine, _ = start(seed=1)
    with pytest.raises(ds_core.errors.CheckpointError) as caught:
        engine.load_checkpoint(folder, tag="micro1")
    before = everything(engine)
    engine.load_checkpoint(folder, tag="micro1", load_optimizer_states=False)
    assert engine.parts.accumulation.in_window == 0
    assert not all(torch.equal(before[name], value) for name, value in everything(engine).items() if "weight" in name)
    return str(caught.value)


def save_in_a_window(folder: Path) -> None:
    engine, loader = start(seed=0)
    run(engine, loader, 1, folder)


def test_a_checkpoint_inside_a_window_says_what_it_needs(tmp_path):
    run_ranks([partial(save_in_a_window, tmp_path)], 2)
    [messages] = run_ranks([partial(load_in_a_window, tmp_path)], 1)
    message = (
        "checkpoint was saved inside an accumulation window by 2 ranks at stage 0, this job has 1 ranks at stage 0\n"
        "  where: load_checkpoint\n"
        "  fix: load it with 2 ranks at stage 0, or save at a step boundary"
    )
    assert messages == [message]


def change_accumulation(folder: Path) -> tuple[int, int]:
    engine, loader = start(seed=0, accumulation=2)
    run(engine, loader, 4)
    engine.save_checkpoint(folder)
    engine, loader = start(seed=1, accumulation=3)
    engine.load_checkpoint(folder)
    run(engine, loader, 3)
    return engine.global_steps, engine.global_samples


def test_accumulation_may_change_at_a_boundary(tmp_path):
    [[(steps, samples)]] = run_ranks([partial(change_accumulation, tmp_path)], 1)
    assert (steps, samples) == (3, 2 * 6 + 9)


def test_files_need_no_unpickling_and_bytes_are_spread(tmp_path):
    run_ranks([partial(save_two_steps, tmp_path)], 2)
    folder = tmp_path / "global_step2"
    assert (tmp_path / "latest").read_text() == "global_step2"
    manifest = json.loads((folder / "checkpoint.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.json", *sorted(manifest["files"])]
    sizes = list(manifest["files"].values())
    assert len(sizes) == 2
    assert max(sizes) < 2 * min(sizes)
    for name in manifest["files"]:
        header_bytes = int.from_bytes((folder / name).read_bytes()[:8], "little")
        assert json.loads((folder / name).read_bytes()[8 : 8 + header_bytes])
