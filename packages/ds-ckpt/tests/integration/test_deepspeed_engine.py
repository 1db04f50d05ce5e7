"""An engine goes on from what DeepSpeed wrote, at another world size and stage, as plain PyTorch would."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ds_core
from ds_core.errors import CheckpointError
from ds_core.testing.ranks import run_ranks

FIXTURES = Path(__file__).parents[1] / "deepspeed-0.19.6"
CASES = sorted(path.parent for path in FIXTURES.glob("*/expected.json"))
STEPS = 2
MICRO = 4
LR = 3e-3
# Of the difference between two equal computations in other orders, in parts of what one update moves a weight, lr.
# fp32: 100 terms cost about 7 of 24 bits, and Adam divides a moment by its root. bf16: gradients of 8 bits differ by
# one unit where a sum is taken in another order, which Adam passes on.
TOLERANCE = {"fp32": 2**-12 * LR, "bf16": 2**-6 * LR}


class Plain(nn.Module):
    """The model of the fixtures."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.l1 = nn.Linear(6, 13)
        self.norm = nn.LayerNorm(13)
        self.l2 = nn.Linear(13, 7)
        self.register_buffer("scale", torch.tensor([0.25]))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.l1(self.emb(x)))
        out: Tensor = self.l2(self.norm(hidden)) * self.scale.to(hidden.dtype)
        return out


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return the samples of all ranks: as many at each world size."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 11, (2 * MICRO,), generator=generator), torch.randn(2 * MICRO, 7, generator=generator)


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return (out.float() - target).square().mean()


def engine_of(about: dict[str, Any], world: int) -> Any:
    torch.manual_seed(1)
    config = {key: value for key, value in about["config"].items() if key != "zero_optimization"}
    config["train_micro_batch_size_per_gpu"] = 2 * MICRO // world
    config["checkpoint"] = {"engine": "sharded"}
    engine, *_ = ds_core.initialize(model=Plain(), config=config)
    return engine


def masters(engine: Any) -> dict[str, Tensor]:
    pieces = list(engine.parts.partition.pieces())
    found = {piece.of.name: piece.data for piece in pieces if piece.of.kind == "weight"}
    return {**found, **{piece.of.name: piece.data for piece in pieces if piece.of.kind == "master"}}


def slots(engine: Any) -> dict[str, dict[str, Tensor]]:
    optimizer = engine.basic_optimizer
    return {piece.of.name: optimizer.state[piece.data] for piece in engine.parts.partition.optimizer_pieces()}


def check_loaded(engine: Any, case: Path, about: dict[str, Any]) -> None:
    held, state = masters(engine), slots(engine)
    for key, value in load_file(case / "expected.safetensors").items():
        name, kind = key.split("|")
        if kind == "buffer":
            assert torch.equal(engine.module.scale, value)
        else:
            found = held[name] if kind == "fp32" else state[name][kind]
            assert torch.equal(found.detach(), value), key
    assert all(slot["step"].item() == 4 for slot in state.values())
    (group,) = engine.basic_optimizer.param_groups
    assert [group["lr"]] == about["lr_after"]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.98), 0.01)
    assert (engine.global_steps, engine.skipped_steps, engine.global_samples) == (4, 0, 16 * about["world"])
    assert engine.lr_scheduler.state_dict() == {"last_batch_iteration": 3}


def reference(case: Path, about: dict[str, Any]) -> dict[str, Tensor]:
    """Return the masters after some more steps of plain PyTorch on one process."""
    expected = load_file(case / "expected.safetensors")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[about["dtype"]]
    model = Plain()
    held = {name: nn.Parameter(expected[f"{name}|fp32"].clone()) for name, _ in model.named_parameters()}
    model.scale = expected["scale|buffer"]
    model.to(dtype)
    model.scale = expected["scale|buffer"]
    optimizer = torch.optim.AdamW(held.values(), lr=LR, betas=(0.9, 0.98))
    for name, param in held.items():
        optimizer.state[param] = {
            "step": torch.tensor(4.0),
            "exp_avg": expected[f"{name}|exp_avg"].clone(),
            "exp_avg_sq": expected[f"{name}|exp_avg_sq"].clone(),
        }
    for step in range(STEPS):
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(held[name])
        model.zero_grad()
        x, target = batch(step)
        loss_of(model(x), target).backward()
        for name, param in model.named_parameters():
            assert param.grad is not None
            held[name].grad = param.grad.float()
        nn.utils.clip_grad_norm_(held.values(), 1.0)
        # The rate of update k+1 is that of the schedule after k steps: linear over 10.
        optimizer.param_groups[0]["lr"] = LR * (3 + step) / 10
        optimizer.step()
    return {name: param.detach() for name, param in held.items()}


def go_on(names: list[str]) -> dict[str, dict[str, Tensor]]:
    """Load each fixture and train on; runs on every rank."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    found = {}
    for name in names:
        case = FIXTURES / name
        about = json.loads((case / "expected.json").read_text())
        engine = engine_of(about, world)
        path, client_state = engine.load_checkpoint(case)
        assert path == str(case / "global_step4")
        assert client_state == {"epoch": 2, "note": "fixture", "ds_version": about["deepspeed"]}
        check_loaded(engine, case, about)
        for step in range(STEPS):
            x, target = (part.chunk(world)[rank] for part in batch(step))
            engine.backward(loss_of(engine(x), target))
            engine.step()
        assert engine.global_steps == 4 + STEPS
        found[name] = {key: value.detach().clone() for key, value in masters(engine).items()}
    return found


def names_here() -> list[str]:
    has_bf16 = importlib.util.find_spec("ds_fp16") is not None
    return [case.name for case in CASES if has_bf16 or not case.name.endswith("bf16")]


@pytest.mark.parametrize("world", [1, 2])
def test_an_engine_goes_on(world: int) -> None:
    (by_rank,) = run_ranks([partial(go_on, names_here())], world)
    for name in names_here():
        about = json.loads((FIXTURES / name / "expected.json").read_text())
        expected = reference(FIXTURES / name, about)
        before = load_file(FIXTURES / name / "expected.safetensors")
        for of_rank in by_rank:
            for key, value in of_rank[name].items():
                torch.testing.assert_close(value, expected[key], rtol=0, atol=TOLERANCE[about["dtype"]])
                # The steps are seen: an update moves weights by about the rate.
                assert (value - before[f"{key}|fp32"]).abs().max() > LR / 10


def test_weights_alone_are_loaded_too() -> None:
    run_ranks([load_parts], 1)


def load_parts() -> None:
    case = FIXTURES / "plain-stage2-world2-fp32"
    about = json.loads((case / "expected.json").read_text())
    engine = engine_of(about, 1)
    engine.load_checkpoint(case, load_optimizer_states=False)
    assert not any(slots(engine).values())
    assert engine.global_steps == 4
    engine = engine_of(about, 1)
    engine.load_checkpoint(case, load_module_only=True)
    assert engine.global_steps == 0
    expected = load_file(case / "expected.safetensors")
    for name, value in masters(engine).items():
        assert torch.equal(value.detach(), expected[f"{name}|fp32"])
    config = {"train_batch_size": 1, "checkpoint": {"engine": "sharded"}}
    other, *_ = ds_core.initialize(model=nn.Linear(3, 3), config=config)
    with pytest.raises(CheckpointError, match="model and checkpoint differ"):
        other.load_checkpoint(case)
