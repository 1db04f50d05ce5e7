"""State of any optimizer goes from each stage and world size to each: tensors, Python values, step counts.

Every gradient is a power of two, so it is the same number at each world size: 3 x (1/3, rounded) is 1. What two places
may then differ in is how kernels round, vectors at a time or not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ds_core
from ds_core import registry
from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.engine import state as engine_state
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import MASTER, WEIGHT
from ds_core.optim.slots import slot_pieces
from ds_core.testing.anywhere import in_world
from ds_core.testing.going_on import Held, stored, whole
from ds_core.testing.ranks import run_ranks
from ds_core.testing.resume import unequal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

PLACES = [(world, stage) for world in (1, 2, 3) for stage in (0, 1, 2)]
SAVED_AFTER, STEPS = 2, 5
BOUND = 2.0**-18
"""Of what differs at the end: weights, updates and slots are below 4, whose last bit is 2**-22, and each of three steps
rounds in four operations or fewer that the two places may do otherwise."""


class Model(nn.Module):
    """Parameters of all shapes; one is used only once the checkpoint was written, one is frozen."""

    def __init__(self, *, with_empty: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        shapes = {"matrix": (7, 5), "wide": (3, 11), "vector": (13,), "scalar": (), "one": (1,), "late": (4, 3)}
        if with_empty:
            shapes["empty"] = (0, 4)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.frozen = nn.Parameter(torch.randn(6, 2, generator=generator), requires_grad=False)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        loss = torch.zeros(())
        for name, param in self.named_parameters():
            slope = torch.exp2(torch.randint(-3, 1, param.shape, generator=generator).float())
            slope *= 1 - 2 * torch.randint(0, 2, param.shape, generator=generator)
            if name != "frozen" and (name != "late" or step >= SAVED_AFTER):
                loss = loss + (param * slope).sum().float()
        return loss


class Whole(torch.optim.Optimizer):
    """Looks at whole tensors, and keeps numbers, words and tensors of several shapes."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state.update(steps=0, history=[], shape=tuple(param.shape), average=torch.zeros_like(param))
                    state["rows"] = torch.zeros(param.shape[:1])
                state["steps"] += 1
                state["history"].append((state["steps"], float(param.norm())))
                state["rows"] += param.grad.flatten(1).sum(1) if param.dim() > 1 else param.grad
                state["average"].lerp_(param.grad, 0.5)
                scale = state["steps"] * (1 + param.norm() + state["rows"].norm())
                param.sub_(state["average"] * (group["lr"] / scale))


class Counting(torch.optim.Optimizer):
    """Treats elements by themselves, with a count in Python and one in a tensor of one element."""

    elementwise = True

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state["steps"] = state.get("steps", 0) + 1
                    state.setdefault("count", torch.zeros(1)).add_(1)
                    state.setdefault("sum", torch.zeros_like(param)).add_(param.grad)
                    param.sub_(state["sum"] * (group["lr"] / (state["steps"] + state["count"].item())))


@dataclass(frozen=True)
class Kind:
    """An optimizer, and what it is used with."""

    client: type[torch.optim.Optimizer] | None = None
    named: dict[str, Any] = field(default_factory=dict, compare=False)
    with_empty: bool = True
    precision: str = "fp32"


KINDS = {
    "AdamW": Kind(named={"type": "AdamW", "params": {"lr": 0.1, "amsgrad": True}}),
    "AdamW in bf16": Kind(named={"type": "AdamW", "params": {"lr": 0.1}}, precision="bf16"),
    "NAdam": Kind(named={"type": "NAdam", "params": {"lr": 0.1}}),
    "ASGD": Kind(named={"type": "ASGD", "params": {"lr": 0.1}}),
    # It divides by the number of elements.
    "Adafactor": Kind(named={"type": "Adafactor", "params": {"lr": 0.1}}, with_empty=False),
    "Adafactor in bf16": Kind(named={"type": "Adafactor", "params": {"lr": 0.1}}, with_empty=False, precision="bf16"),
    "whole": Kind(client=Whole),
    "counting": Kind(client=Counting),
}


def kinds_here() -> list[str]:
    return [name for name, kind in KINDS.items() if kind.precision in registry.names("precision")]


def start(name: str, stage: int, **config: Any) -> Any:
    kind = KINDS[name]
    model = Model(with_empty=kind.with_empty)
    optimizer = None
    if kind.client is not None:
        params = [param for param in model.parameters() if param.requires_grad]
        optimizer = kind.client([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}])
    sections: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "checkpoint": {"engine": "plain"},
        **({"optimizer": kind.named} if optimizer is None else {}),
        **({"bf16": {"enabled": True}} if kind.precision == "bf16" else {}),
        **config,
    }
    return ds_core.initialize(model=model, optimizer=optimizer, config=sections)[0]


def train(engine: Any, until: int) -> None:
    while engine.global_steps < until:
        engine.backward(engine(engine.global_steps))
        engine.step()


def held(engine: Any) -> Held:
    """Return copies of this rank's tensors, and what its optimizer keeps beside them."""
    partition, optimizer = engine.parts.partition, engine.basic_optimizer
    of_optimizer = partition.optimizer_pieces()
    pieces = [*partition.pieces(), *slot_pieces(optimizer, of_optimizer)]
    values: dict[str, Any] = {}
    for piece in of_optimizer:
        found = {key: value for key, value in optimizer.state.get(piece.data, {}).items() if not torch.is_tensor(value)}
        if found:
            values[piece.of.name] = found
        if piece.data in optimizer.state and "step" in optimizer.state[piece.data]:
            assert optimizer.state[piece.data]["step"].shape == ()
    assert list(partition.gradient_pieces()) == []
    tensors = [(piece.of, piece.chunk, piece.data.detach().clone()) for piece in pieces]
    return Held(tensors, {"values": values, "with state": len(optimizer.state)}, torch.get_rng_state())


def write(name: str, stage: int, folder: Path) -> tuple[Held, Held]:
    engine = start(name, stage)
    train(engine, SAVED_AFTER)
    saved = held(engine)
    engine.save_checkpoint(folder, tag="tag")
    train(engine, STEPS)
    end = held(engine)
    engine.destroy()
    return saved, end


def read(name: str, stage: int, folder: Path) -> tuple[Held, Held]:
    engine = start(name, stage)
    # What it has of its own must be gone afterwards.
    engine.backward(engine(40))
    engine.step()
    engine.load_checkpoint(folder, tag="tag")
    loaded = held(engine)
    train(engine, STEPS)
    end = held(engine)
    engine.destroy()
    return loaded, end


def folder_of(folder: Path, name: str, place: tuple[int, int]) -> Path:
    return folder / f"{name}, {place[0]} ranks at stage {place[1]}"


def sources() -> list[tuple[str, tuple[int, int]]]:
    return [(name, place) for name in kinds_here() for place in PLACES]


def pairs() -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
    """Return (optimizer, source, target): each source read at another place, in turn, and some where they were written.

    Of eight optimizers each has another turn, so that every place reads what every other one wrote.
    """
    found = []
    for index, (name, source) in enumerate(sources()):
        at, offset = index % len(PLACES), index // len(PLACES)
        found.append((name, source, PLACES[(at + 1 + offset) % len(PLACES)]))
        if (at + offset) % 3 == 0:
            found.append((name, source, source))
    return found


def exports() -> list[tuple[str, tuple[int, int]]]:
    names = [name for name in ("AdamW", "AdamW in bf16", "Adafactor") if name in kinds_here()]
    return [(name, place) for name in names for place in PLACES if min(place) > 0 and place[0] > 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def gone_on(folder: Path) -> dict[Any, list[Any]]:
    """Everything in one spawn, by key: what each rank had of it.

    Keys: (optimizer, source), (optimizer, source, target), ("fail", place), ("export", optimizer, place).
    """
    saves = {(name, place): partial(write, name, place[1], folder_of(folder, name, place)) for name, place in sources()}
    loads = {(name, at, to): partial(read, name, to[1], folder_of(folder, name, at)) for name, at, to in pairs()}
    others: dict[Any, Any] = {("fail", (2, stage)): partial(fail, stage, folder / str(stage)) for stage in (1, 2)}
    for name, place in exports():
        others["export", name, place] = partial(export, name, place[1], folder_of(folder, f"export of {name}", place))
    for stage in (1, 2):
        (folder / str(stage)).mkdir()
        (folder / str(stage) / "file").touch()
    functions, keys = [], []
    for jobs in (saves, {**loads, **others}):
        for world in sorted({world for world, _ in PLACES}):
            mine = {key: job for key, job in jobs.items() if key[-1][0] == world}
            functions.append(partial(in_world, world, list(mine.values())))
            keys.append(list(mine))
    results = run_ranks(functions, 3, timeout_s=200)
    return {
        key: [by_rank[rank][at] for rank in range(key[-1][0])]
        for of_world, by_rank in zip(keys, results, strict=True)
        for at, key in enumerate(of_world)
    }


def together(ranks: Sequence[Held]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return whole tensors and the Python values of all ranks, which must not contradict each other."""
    problems: list[str] = []
    tensors = whole(ranks, problems, "held")
    assert problems == []
    values: dict[str, Any] = {}
    for of_rank in ranks:
        for name, theirs in of_rank.numbers["values"].items():
            assert values.setdefault(name, theirs) == theirs
    return tensors, values


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", KINDS)
def test_state_of_an_optimizer_loads_anywhere(name: str, gone_on: dict[Any, list[Any]]) -> None:
    if name not in kinds_here():
        pytest.skip(f"{KINDS[name].precision} is not installed")
    for source, target in [(source, target) for of, source, target in pairs() if of == name]:
        saved, expected = ([of_rank[at] for of_rank in gone_on[name, source]] for at in (0, 1))
        loaded, end = ([of_rank[at] for of_rank in gone_on[name, source, target]] for at in (0, 1))
        tensors, values = together(saved)
        found, found_values = together(loaded)
        assert (unequal(found, tensors), found_values) == ([], values), f"{source} -> {target}"
        if KINDS[name].client is not None:
            assert values["vector"]["steps"] == SAVED_AFTER
            assert "late" not in values
        else:
            assert tensors["step scalar"].item() == SAVED_AFTER
        (tensors, values), (found, found_values) = together(expected), together(end)
        assert found.keys() == tensors.keys()
        assert nearly(found_values, values), f"{source} -> {target}"
        if source == target:
            assert unequal(found, tensors) == []
            assert [of_rank.numbers for of_rank in end] == [of_rank.numbers for of_rank in expected]
        for key, value in tensors.items():
            assert value.numel() == 0 or (found[key].double() - value.double()).abs().max() <= bound_of(value), (
                f"{source} -> {target}: {key}"
            )


def nearly(a: Any, b: Any) -> bool:
    """Return whether two Python values are equal, floats within the bound."""
    if isinstance(a, float):
        return abs(a - b) <= BOUND * max(1.0, abs(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(nearly(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(nearly, a, b))
    return bool(a == b)


def bound_of(value: Tensor) -> float:
    # In 16 bits two masters that differ by anything may be rounded to neighbours, which are 2**-8 of a value apart.
    return BOUND if value.dtype.itemsize > 2 else 2.0**-7 * 4


def test_a_rank_keeps_state_of_whole_tensors_only_for_its_own(gone_on: dict[Any, list[Any]]) -> None:
    for name in ("whole", "Adafactor"):
        trained = len([param for param in Model(with_empty=KINDS[name].with_empty).parameters() if param.requires_grad])
        for key, by_rank in gone_on.items():
            if key[0] != name:
                continue
            world, stage = key[-1]
            for at in (0, 1):
                counts = [of_rank[at].numbers["with state"] for of_rank in by_rank]
                used = trained - 1 if at == 0 else trained
                assert counts == [used] * world if stage == 0 else sum(counts) == used, (key, counts)


# -- failing together --------------------------------------------------------------------------------------------------


def fail(stage: int, folder: Path) -> list[str]:
    """Save in a window where one rank cannot; returns what this rank was told. Later saves go on in step."""
    rank = torch.distributed.get_rank()
    engine = start("AdamW", stage, gradient_accumulation_steps=2)
    engine.backward(engine(0))
    with pytest.raises(CheckpointError) as between:
        engine.save_checkpoint(folder)
    engine.step()
    window = engine.parts.partition._gradients
    window._aborted = rank == 1
    with pytest.raises(CheckpointError) as aborted:
        engine.save_checkpoint(folder)
    window._aborted = False
    real = engine_state._make_folder
    try:
        if rank == 1:
            engine_state._make_folder = lambda directory: real(directory / "file" / "no folder")
        with pytest.raises(CheckpointError) as no_folder:
            engine.save_checkpoint(folder)
    finally:
        engine_state._make_folder = real
    engine.save_checkpoint(folder, tag="last")
    again = start("AdamW", stage, gradient_accumulation_steps=2)
    again.load_checkpoint(folder)
    for one in (engine, again):
        one.backward(one(1))
        one.step()
    assert unequal(*(whole([held(one)], [], "") for one in (engine, again))) == []
    return [error.value.what for error in (between, aborted, no_folder)]


def test_a_save_inside_a_window_fails_on_all_ranks_or_on_none(gone_on: dict[Any, list[Any]]) -> None:
    for told in (of_rank for stage in (1, 2) for of_rank in gone_on["fail", (2, stage)]):
        between, aborted, no_folder = told
        assert "was called between a backward and its step" in between
        assert "the backward before this one raised" in aborted
        assert "the folder cannot be made" in no_folder


# -- weights for others ------------------------------------------------------------------------------------------------


def export(name: str, stage: int, folder: Path) -> dict[str, Tensor]:
    """Save and export after some steps; returns the weights that this rank computes with."""
    engine = start(name, stage)
    train(engine, STEPS)
    engine.save_checkpoint(folder, tag="tag")
    engine.export_weights(folder / "full", dtype="float32")
    assert engine.save_16bit_model(folder / "model", "model.safetensors")
    return {name: value.detach().clone() for name, value in engine.module_state_dict().items()}


def test_exported_weights_are_the_masters(folder: Path, gone_on: dict[Any, list[Any]]) -> None:
    for name, place in exports():
        by_rank, saved = gone_on["export", name, place], folder_of(folder, f"export of {name}", place)
        masters = masters_in(saved)
        exported = load_file(saved / "full" / "model.safetensors")
        weights = load_file(saved / "model" / "model.safetensors")
        # Buffers are exported too.
        assert exported.keys() == weights.keys() == by_rank[0].keys() == {*masters, "scale"}
        for key, master in masters.items():
            assert exported[key].dtype == torch.float32
            assert torch.equal(exported[key], master), key
            for of_rank in by_rank:
                assert torch.equal(weights[key], of_rank[key])
                assert torch.equal(weights[key], master.to(weights[key].dtype))


def masters_in(folder: Path) -> dict[str, Tensor]:
    """Return what the checkpoint has of each weight with the most digits."""
    with PlainCheckpoint(None, None).open(folder, "tag") as reader:
        found = stored(reader)
    weights = {key.split(" ")[1]: value for key, value in found.items() if key.startswith(f"{WEIGHT} ")}
    return weights | {key.split(" ")[1]: value for key, value in found.items() if key.startswith(f"{MASTER} ")}
