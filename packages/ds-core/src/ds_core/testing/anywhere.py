"""Saving at one place and going on at another: world size, partition, offload, checkpoint engine (P02).

A :class:`Case` is one checkpoint and who reads it. :func:`run` takes any number of cases through one spawn and returns
what is wrong with each. Every case shows all of this:

- the folder holds what the saving ranks held, bit for bit: weights, masters, buffers, slots, unfinished gradients;
- the loading ranks hold the same, and the same schedule, scaler, counters, data position and random generators;
- a checkpoint that they save again holds the same once more, so what was written is the same wherever it was written;
- the next :data:`STEPS` steps are those of the run that was not stopped: bit for bit at the same place, else within
  the bounds below; rates, loss scales, skipped steps and the data position are the same everywhere.

Every step takes the same :data:`STEP_SAMPLES` samples at each place, shared out over ranks and micro-batches.

"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_core.errors import CheckpointError
from ds_core.testing.going_on import CLIENT_STATE, LR, STEPS, Run, Steps, differences, held, stored
from ds_core.testing.ranks import run_ranks
from ds_core.testing.resume import ResumeModel, start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path


__all__ = ["PRECISIONS", "SETUPS", "WORLD_SIZES", "Case", "Place", "assumptions", "in_world", "problems", "run"]

WORLD_SIZES = (1, 2, 3, 4, 8)
ACCUMULATION = {1: 4, 2: 4, 3: 2, 4: 2, 8: 2}
"""World size -> micro-batches of a step, which get smaller where there are more of them."""
STEP_SAMPLES = 48
DATA_SAMPLES = 3 * STEP_SAMPLES
"""Of an epoch: the checkpoint lies in the second one, and steps after it in seven more."""
SAVED_AFTER = 4
OVERFLOWS = (2, SAVED_AFTER + 5)
"""Steps whose gradients overflow on the last rank, where the precision skips those."""
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 4, "hysteresis": 1}},
    "bf16": {"bf16": {"enabled": True}},
    "torch_autocast": {"torch_autocast": {"enabled": True, "dtype": "bf16"}},
}
"""Entry name -> its sections."""
SETUPS = ("one group", "two groups", "in a window")
"""AdamW of the configuration; the client's own with one more slot; saved in the middle of an accumulation window."""
ENGINES: dict[str, dict[str, Any]] = {
    # Files and chunks so small that the model has many of both, and chunks end inside its tensors.
    "sharded": {"writers": 2, "chunk_bytes": 96},
}


@dataclass(frozen=True)
class Place:
    """Where an engine trains."""

    world_size: int
    partition: str
    """The entry name."""
    offload: str = "none"
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Sections that turn partition and offload on."""


@dataclass(frozen=True)
class Case:
    """One checkpoint, written by ``source`` and read by ``target``."""

    source: Place
    target: Place
    precision: str = "fp32"
    setup: str = SETUPS[0]
    saved_by: str = "plain"
    loaded_by: str = "plain"
    before_load: Callable[[Any], None] | None = None
    """Plants a defect in the engine that is going to load; for tests of this module."""
    before_steps: Callable[[Any], None] | None = None
    """Plants one after it was looked at what was loaded."""

    @property
    def same_place(self) -> bool:
        return self.source == self.target

    @property
    def is_refused(self) -> bool:
        """Whether it is saved in a window and read elsewhere: unfinished gradients belong to ranks."""
        return self.setup == "in a window" and (
            (self.source.world_size, self.source.partition) != (self.target.world_size, self.target.partition)
        )


def run(cases: Sequence[Case], folder: Path, *, timeout_s: float = 300.0) -> list[list[str]]:
    """Take ``cases`` through one spawn of as many ranks as the largest needs; return what is wrong with each.

    Args:
        cases: any.
        folder: where checkpoints go; exists.
        timeout_s: for all cases of one world size.
    """
    places = [(case.source, case.target) for case in cases]
    world_sizes = sorted({place.world_size for pair in places for place in pair})
    jobs: list[tuple[Any, int, list[int]]] = []
    for job, side in ((write, 0), (read, 1)):
        for world_size in world_sizes:
            of_it = [index for index, pair in enumerate(places) if pair[side].world_size == world_size]
            jobs.append((job, world_size, of_it))
    functions = [
        partial(in_world, world_size, [partial(job, cases[index], folder / str(index)) for index in of_it])
        for job, world_size, of_it in jobs
    ]
    accounts: dict[tuple[Any, int], list[Any]] = {}
    results = run_ranks(functions, max(world_sizes), timeout_s=timeout_s)
    for (job, world_size, of_it), by_rank in zip(jobs, results, strict=True):
        for at, index in enumerate(of_it):
            accounts[job, index] = [by_rank[rank][at] for rank in range(world_size)]
    return [problems(case, accounts[write, index], accounts[read, index]) for index, case in enumerate(cases)]


def in_world(world_size: int, functions: Sequence[Callable[[], Any]]) -> list[Any] | None:
    """Run ``functions`` on the first ``world_size`` ranks of a larger spawn, as if there were no others."""
    rank = dist.get_rank()
    # Nobody may leave the group of all while others are still being connected to it.
    dist.barrier()
    if rank >= world_size:
        return None
    dist.destroy_process_group()
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    # Rank 0 has the store; a name that no function before had.
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
    named = dist.PrefixStore(f"first.{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=named, rank=rank, world_size=world_size)
    return [function() for function in functions]


def write(case: Case, folder: Path) -> Run:
    """Train, save, go on without having stopped. On every rank of the source."""
    engine = _begin(case, case.source, case.saved_by, seed=0)
    trainer = _Trainer(engine, case.precision)
    trainer.advance(SAVED_AFTER)
    if case.setup == "in a window":
        trainer.micro_step()
    at_save = held(engine)
    engine.save_checkpoint(folder, client_state=CLIENT_STATE)
    if case.is_refused:
        engine.parts.checkpoint.commit()
        engine.destroy()
        return Run(at_save, Steps(), at_save)
    # One that is written in the background is written while the next steps change everything.
    steps = trainer.advance(SAVED_AFTER + STEPS)
    engine.parts.checkpoint.commit()
    found = Run(at_save, steps, held(engine))
    engine.destroy()
    return found


def read(case: Case, folder: Path) -> Run | str:
    """Load, save again, go on. On every rank of the target; returns the error where the checkpoint is refused."""
    engine = _begin(case, case.target, case.loaded_by, seed=7)
    if case.before_load is not None:
        case.before_load(engine)
    try:
        path, client_state = engine.load_checkpoint(folder)
    except CheckpointError as error:
        engine.destroy()
        return str(error)
    at_load = held(engine)
    engine.save_checkpoint(folder / "again", tag="again")
    if case.before_steps is not None:
        case.before_steps(engine)
    steps = _Trainer(engine, case.precision).advance(SAVED_AFTER + STEPS)
    engine.parts.checkpoint.commit()
    found = Run(at_load, steps, held(engine), client_state=client_state)
    if dist.get_rank() == 0:
        # Of the class: a defect planted in the engine is not to be seen here.
        checkpoint = engine.parts.checkpoint
        for directory, tag in ((folder, path.rpartition(os.sep)[2]), (folder / "again", "again")):
            with type(checkpoint).open(checkpoint, directory, tag) as reader:
                found.stored.append(stored(reader))
    engine.destroy()
    return found


def _begin(case: Case, place: Place, checkpoint: str, *, seed: int) -> Any:
    # Generators are saved by rank, so only as many ranks draw the same.
    dropout = 0.3 if case.source.world_size == case.target.world_size else 0.0
    torch.manual_seed(seed)
    model, optimizer = ResumeModel(dropout), None
    params: dict[str, Any] = {"lr": LR[0], "weight_decay": 0.1, "eps": 1.0}
    rates: Any = LR[0]
    if case.setup == "two groups":
        trained = [param for param in model.parameters() if param.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [param for param in trained if param.dim() > 1]},
            {"params": [param for param in trained if param.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer, rates = torch.optim.AdamW(groups, amsgrad=True, **params), list(LR)
    accumulation = ACCUMULATION[place.world_size]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": STEP_SAMPLES // (place.world_size * accumulation),
        "gradient_accumulation_steps": accumulation,
        "checkpoint": {"engine": checkpoint, **{name: ENGINES[name] for name in ENGINES if name == checkpoint}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_num_steps": 8, "total_num_steps": 40, "warmup_min_lr": 0.001, "warmup_max_lr": rates},
        },
        **PRECISIONS[case.precision],
        **place.config,
    }
    if optimizer is None:
        config["optimizer"] = {"type": "AdamW", "params": params}
    return start(config, seed=seed, model=model, optimizer=optimizer, samples=DATA_SAMPLES)


class _Trainer:
    """Trains an engine on its own data, in one pass over the loader however often it is asked to go on."""

    def __init__(self, engine: Any, precision: str) -> None:
        self.engine, self.overflows = engine, () if precision == "fp32" else OVERFLOWS
        self.batches = self._forever()

    def advance(self, until: int) -> Steps:
        """Train to the end of step ``until``."""
        found, engine = Steps(), self.engine
        while (step := engine.global_steps) < until:
            losses = []
            while engine.global_steps == step:
                losses.append(self.micro_step())
            found.losses.append(losses)
            found.rates.append(engine.get_lr())
            found.scales.append(engine.cur_scale)
        return found

    def micro_step(self) -> float:
        engine = self.engine
        first = engine.parts.accumulation.in_window == 0
        # The model's buffers change once in a step, however many micro-batches it has.
        engine.train(first)
        last_rank = dist.get_rank() == dist.get_world_size() - 1
        loss = engine(next(self.batches), overflow=first and last_rank and engine.global_steps in self.overflows)
        engine.backward(loss)
        engine.step()
        return float(loss.item())

    def _forever(self) -> Iterator[Any]:
        while True:
            yield from self.engine.training_dataloader


def problems(case: Case, source: Sequence[Run], target: Sequence[Run | str]) -> list[str]:
    """Return what is wrong with a case, in words; empty: nothing."""
    refusals = [of_rank for of_rank in target if isinstance(of_rank, str)]
    runs = [of_rank for of_rank in target if not isinstance(of_rank, str)]
    if case.is_refused:
        said = [text for text in refusals if "saved inside an accumulation window" in text]
        return [] if len(said) == len(target) else [f"to be refused on every rank, was on {len(said)}: {refusals[:1]}"]
    if refusals:
        return [f"refused: {refusals[0]}"]
    return differences(source, runs, precision=case.precision, same_place=case.same_place)


def assumptions(setup: str) -> dict[str, float]:
    """Return the largest values, of every tenth step of a run on one rank, of what the bound in fp32 assumes."""
    place = Place(1, "replicated")
    engine = _begin(Case(place, place, setup=setup), place, "plain", seed=0)
    trainer = _Trainer(engine, "fp32")
    data = engine.training_dataloader.dataset
    found = dict.fromkeys(("curvature", "slope", "gradient", "weight", "norm"), 0.0)
    for step in range(SAVED_AFTER, SAVED_AFTER + STEPS + 1, 10):
        trainer.advance(step)
        engine.eval()
        model = engine.module
        trained = [param for param in model.parameters() if param.requires_grad and param.numel()]
        values = [*trained, model.mean.requires_grad_()]
        for batch in data.split(STEP_SAMPLES):
            slopes = _flat(torch.autograd.grad(model(batch), values, create_graph=True))
            # Rows of weights only: the buffer follows the weights, no gradient of it is used.
            rows = [
                _flat(torch.autograd.grad(slope, values, retain_graph=True))
                for slope in slopes[: slopes.numel() - model.mean.numel()]
            ]
            measured = {
                "curvature": torch.stack(rows).abs().sum(1).max(),
                "slope": slopes.abs().sum(),
                "gradient": slopes.abs().max(),
                "weight": _flat(values).abs().max(),
                "norm": engine.get_global_grad_norm(),
            }
            found = {name: max(value, float(torch.as_tensor(measured[name]).detach())) for name, value in found.items()}
        model.mean.requires_grad_(False)
    engine.destroy()
    return found


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
