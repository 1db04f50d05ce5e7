"""An engine goes on from what DeepSpeed wrote, at another world size and stage, as plain PyTorch would."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ds_core
from ds_core.errors import CheckpointError
from ds_core.testing.anywhere import in_world
from ds_core.testing.ranks import run_ranks

FIXTURES = Path(__file__).parents[1] / "deepspeed-0.19.6"
CASES = sorted(path.parent for path in FIXTURES.glob("*/expected.json"))
WORLDS = (1, 2, 3, 4)
STEPS = 2
SAMPLES = 24
"""Of a step, at each world size."""
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
    """Return the samples of all ranks."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 11, (SAMPLES,), generator=generator), torch.randn(SAMPLES, 7, generator=generator)


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return (out.float() - target).square().mean()


def engine_of(about: dict[str, Any], world: int) -> Any:
    torch.manual_seed(1)
    config = {key: value for key, value in about["config"].items() if key != "zero_optimization"}
    config["train_micro_batch_size_per_gpu"] = SAMPLES // world
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


@pytest.fixture(scope="module")
def gone_on(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[Any]]:
    """Everything that goes on, in one spawn: (what, world size) -> what each rank found."""
    folder = tmp_path_factory.mktemp("written")
    write_layouts(folder)
    jobs = [partial(go_on, names_here()), partial(go_on_with_many, folder, truth())]
    by_world = run_ranks([partial(in_world, world, jobs) for world in WORLDS], max(WORLDS), timeout_s=120)
    found: dict[tuple[str, int], list[Any]] = {}
    for world, results in zip(WORLDS, by_world, strict=True):
        for at, what in enumerate(("fixtures", "layouts")):
            found[what, world] = [results[rank][at] for rank in range(world)]
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_an_engine_goes_on(world: int, gone_on: dict[tuple[str, int], list[Any]]) -> None:
    by_rank = gone_on["fixtures", world]
    assert len(by_rank) == world
    for name in names_here():
        about = json.loads((FIXTURES / name / "expected.json").read_text())
        expected = reference(FIXTURES / name, about)
        before = load_file(FIXTURES / name / "expected.safetensors")
        for of_rank in by_rank:
            assert of_rank[name].keys() == expected.keys()
            for key, value in of_rank[name].items():
                torch.testing.assert_close(value, expected[key], rtol=0, atol=TOLERANCE[about["dtype"]])
                # The steps are seen: an update moves weights by about the rate.
                assert (value - before[f"{key}|fp32"]).abs().max() > LR / 10


# -- what the fixtures lack: groups, tied, frozen, scalar and empty parameters, round robin, universal folders ---------


def _module(name: str) -> Any:
    # Tests are no package (--import-mode=importlib), so a file beside is loaded by its path.
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


w = _module("deepspeed_writer")
MANY_LR = 0.2
"""The higher of the rates that the writer gives its groups."""


class Many(nn.Module):
    """Sizes that nothing divides; a tied, a frozen, a scalar parameter and one without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 5)
        self.l1 = nn.Linear(5, 7)
        self.l2 = nn.Linear(7, 5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.emb.weight
        self.fz = nn.Linear(5, 5).requires_grad_(False)
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.gain = nn.Parameter(torch.ones(()))
        self.register_buffer("scale", torch.tensor([0.5]))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.l2(nn.functional.gelu(self.l1(self.emb(x))))
        out: Tensor = self.head(hidden + self.fz(hidden)) * self.gain * self.scale + self.none.sum()
        return out


def groups_of(model: nn.Module) -> list[dict[str, Tensor]]:
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    return [
        {name: param for name, param in trained.items() if not name.endswith("bias")},
        {name: param for name, param in trained.items() if name.endswith("bias")},
    ]


def truth() -> dict[str, Tensor]:
    """Return what the checkpoints are made of: ``<name>|<kind>``."""
    model = written_model()
    found = {f"{name}|master": value for name, value in model.trained.items()}
    found |= {f"{name}|frozen": value for name, value in model.frozen.items()}
    found |= {f"{name}|buffer": value for name, value in model.buffers.items()}
    return found | {f"{name}|{slot}": value for (name, slot), value in model.slots.items()}


def written_model() -> Any:
    torch.manual_seed(3)
    model = Many()
    groups = [{name: param.detach().clone() for name, param in group.items()} for group in groups_of(model)]
    frozen = {name: param.detach() for name, param in model.named_parameters() if not param.requires_grad}
    written = w.Model(groups, frozen, {"scale": torch.tensor([0.75])}, {"head.weight": "emb.weight"})
    for (name, slot), value in written.slots.items():
        # Second moments are squares, and not so small that rounding errors are divided by next to nothing.
        written.slots[name, slot] = value.square() + 0.25 if slot == "exp_avg_sq" else value
    return written


LAYOUTS: dict[str, Any] = {
    "stage 1 on 3": lambda folder, model: w.write_partitions(folder, model, 3, stage=1),
    "stage 2 on 4, round robin": lambda folder, model: w.write_partitions(folder, model, 4, round_robin=True),
    "stage 3 on 2": lambda folder, model: w.write_slices(folder, model, 2),
    "stage 3 on 3, sub-groups": lambda folder, model: w.write_slices(folder, model, 3, sub_group_size=20),
    "universal of stage 2": lambda folder, model: w.write_universal(folder, model, stage=2),
    "universal of stage 3": lambda folder, model: w.write_universal(folder, model, stage=3, sub_group_size=20),
}


def write_layouts(folder: Path) -> None:
    for name, write in LAYOUTS.items():
        write(folder / name / "tag", written_model())
        (folder / name / "latest").write_text("tag")


def engine_of_many(world: int, expected: dict[str, Tensor], layout: str) -> Any:
    torch.manual_seed(1)
    model = Many()
    if layout == "universal of stage 3":
        # There frozen weights are not in the files.
        for name, param in model.named_parameters():
            if not param.requires_grad:
                param.data.copy_(expected[f"{name}|frozen"])
    optimizer = torch.optim.AdamW([{"params": list(group.values())} for group in groups_of(model)], lr=1.0)
    config = {
        "train_micro_batch_size_per_gpu": SAMPLES // world,
        "gradient_clipping": 0.0,
        "checkpoint": {"engine": "sharded"},
    }
    engine, *_ = ds_core.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def many_batch(step: int) -> tuple[Tensor, Tensor]:
    x, _ = batch(step)
    return x, torch.randn(SAMPLES, 11, generator=torch.Generator().manual_seed(50 + step))


def go_on_with_many(folder: Path, expected: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Load each layout, compare every bit, and train on; runs on every rank."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    found = {}
    for layout in LAYOUTS:
        engine = engine_of_many(world, expected, layout)
        _, client_state = engine.load_checkpoint(folder / layout, load_module_strict=layout != "universal of stage 3")
        assert client_state["epoch"] == 3
        assert engine.module.head.weight is engine.module.emb.weight
        state, weights = slots(engine), masters(engine)
        assert state.keys() == {key.split("|")[0] for key in expected if key.endswith("|master")}
        for key, value in expected.items():
            name, kind = key.split("|")
            here = weights[name] if kind in ("master", "frozen") else state[name][kind] if kind != "buffer" else None
            assert torch.equal(engine.module.scale if here is None else here.detach(), value), f"{layout}: {key}"
        assert all(slot["step"].item() == 7 for slot in state.values())
        options = [
            (group["lr"], group["betas"], group["weight_decay"]) for group in engine.basic_optimizer.param_groups
        ]
        assert options == [(0.1, (0.9, 0.98), 0.01), (0.2, (0.9, 0.98), 0.0)]
        assert (engine.global_steps, engine.skipped_steps, engine.global_samples) == (8, 1, 64)
        for step in range(STEPS):
            x, target = (part.chunk(world)[rank] for part in many_batch(step))
            engine.backward(loss_of(engine(x), target))
            engine.step()
        found[layout] = {key: value.detach().clone() for key, value in masters(engine).items()}
    return found


def reference_of_many(expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights after some more steps of plain PyTorch on one process."""
    model = Many()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(expected[f"{name}|{'master' if param.requires_grad else 'frozen'}"])
        model.scale.copy_(expected["scale|buffer"])
    decayed, others = groups_of(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(decayed.values()), "lr": 0.1, "weight_decay": 0.01},
            {"params": list(others.values()), "lr": 0.2, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    for name, param in {**decayed, **others}.items():
        moments = {slot: expected[f"{name}|{slot}"].clone() for slot in w.SLOTS}
        optimizer.state[param] = {"step": torch.tensor(7.0), **moments}
    for step in range(STEPS):
        optimizer.zero_grad()
        x, target = many_batch(step)
        loss_of(model(x), target).backward()
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_goes_on_from_every_layout(layout: str, world: int, gone_on: dict[tuple[str, int], list[Any]]) -> None:
    before = truth()
    expected = reference_of_many(before)
    for of_rank in gone_on["layouts", world]:
        assert of_rank[layout].keys() == expected.keys()
        for key, value in of_rank[layout].items():
            # As above, of the rate of these groups; an update divides by a half or more.
            torch.testing.assert_close(value, expected[key], rtol=0, atol=2**-12 * MANY_LR)
            if f"{key}|master" in before and value.numel():
                assert (value - before[f"{key}|master"]).abs().max() > MANY_LR / 20


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
