"""P02: a checkpoint loads at any world size, partition and offload, and training goes on as if it had not stopped.

A partition or checkpoint engine that is installed joins by a row in one of the two tables below; without one the suite
fails. What is compared, and within which bounds, is said in :mod:`ds_core.testing.going_on`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ds_core import registry
from ds_core.interfaces.checkpoint import CheckpointReader
from ds_core.interfaces.logical import MASTER, WEIGHT
from ds_core.testing import anywhere, going_on
from ds_core.testing.anywhere import PRECISIONS, SETUPS, WORLD_SIZES, Case, Place
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.matrix import drawn, pairwise, seed_of_today

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from ds_core.interfaces.logical import LogicalTensor, Piece


pytestmark = pytest.mark.timeout(600)
"""One spawn serves most tests, and the first of them waits for it."""


@dataclass(frozen=True)
class Row:
    """A partition of the matrix."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """Turns it on."""
    offloads: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"none": {}})
    """Each offload that it has, with what turns that on; sections are laid over ``config``."""


PARTITIONS = {
    "replicated": Row(),
    "1": Row({"zero_optimization": {"stage": 1}}),
    "2": Row({"zero_optimization": {"stage": 2}}),
}
"""Entry name -> its row. One with offload, say, would be
``"2": Row({"zero_optimization": {"stage": 2}}, {"none": {}, "cpu": {"zero_optimization": {"stage": 2, ...}}})``."""
READS = {
    "plain": ("plain",),
    "sharded": ("plain", "sharded", "async"),
    "async": ("plain", "sharded", "async"),
}
"""Checkpoint engine -> the engines whose checkpoints it opens."""


def places() -> list[Place]:
    """Return every place there is here, world sizes first."""
    return [
        Place(world_size, name, offload, {**row.config, **changes})
        for name, row in PARTITIONS.items()
        if name in registry.names("partition")
        for offload, changes in row.offloads.items()
        for world_size in WORLD_SIZES
    ]


def engines() -> list[tuple[str, str]]:
    """Return who writes and who reads, all that go together."""
    here = registry.names("checkpoint")
    return [(by, to) for to, readable in READS.items() for by in readable if by in here and to in here]


def precisions() -> list[str]:
    return [name for name in PRECISIONS if name in registry.names("precision")]


def partitions() -> list[Place]:
    return [place for place in places() if place.world_size == 1]


def factors() -> dict[str, Sequence[Any]]:
    return {
        "written on": WORLD_SIZES,
        "read on": WORLD_SIZES,
        "written by": partitions(),
        "read by": partitions(),
        "precision": precisions(),
        "setup": SETUPS[:2],
        "engine": [name for name in READS if name in registry.names("checkpoint")],
        "another engine's": (False, True),
    }


def case_of(row: Mapping[str, Any]) -> Case:
    source = replace(row["written by"], world_size=row["written on"])
    target = replace(row["read by"], world_size=row["read on"])
    loaded_by = row["engine"]
    others = [by for by, to in engines() if to == loaded_by and by != to]
    saved_by = others[source.world_size % len(others)] if others and row["another engine's"] else loaded_by
    return Case(source, target, row["precision"], row["setup"], saved_by, loaded_by)


def in_windows() -> list[Case]:
    """Return cases saved in the middle of a window: read at the same place, and refused at another, for each place."""
    here, precision, engine = places(), precisions(), engines()
    found = []
    for index, place in enumerate(here):
        case = Case(place, place, precision[index % len(precision)], SETUPS[2], *engine[index % len(engine)])
        found += [case, replace(case, target=here[(index + 1) % len(here)])]
    return found


def todays() -> list[Case]:
    return [case_of(row) for row in drawn(factors(), 20, seed=seed_of_today())]


def every_case(precision: str) -> Iterator[Case]:
    """Yield cases in which every place writes, and every place reads, with each setup and pair of engines.

    Each time others read others, so that the square of places is gone through in many rounds, not in each.
    """
    here = places()
    for round_, (setup, engine) in enumerate(product(SETUPS, engines())):
        for index, place in enumerate(here):
            target = place if setup == SETUPS[2] else here[(index + round_) % len(here)]
            yield Case(place, target, precision, setup, *engine)
    for (index, place), setup in product(enumerate(here), SETUPS):
        yield Case(place, place, precision, setup, *engines()[index % len(engines())])
    generator = random.Random(seed_of_today())
    for _ in range(30):
        source, target = generator.choice(here), generator.choice(here)
        yield Case(source, target, precision, generator.choice(SETUPS[:2]), *generator.choice(engines()))


# -- defects that the suite must see -----------------------------------------------------------------------------------


class Damaged(CheckpointReader):
    """Hands on another reader's checkpoint with one thing changed."""

    def __init__(self, real: CheckpointReader, change: Callable[[Piece], None], state: Mapping[str, Any]) -> None:
        self.real, self.change, self._state = real, change, state

    @property
    def state(self) -> Mapping[str, Any]:
        return {key: value for key, value in {**self.real.state, **self._state}.items() if value is not None}

    @property
    def world_size(self) -> int:
        return self.real.world_size

    def rank_state(self, rank: int) -> Mapping[str, Any]:
        return {} if "rng" in self._state else self.real.rank_state(rank)

    def tensors(self) -> Sequence[LogicalTensor]:
        return self.real.tensors()

    def read(self, wanted: Sequence[Piece]) -> None:
        self.real.read(wanted)
        for piece in wanted:
            self.change(piece)

    def close(self) -> None:
        self.real.close()


def damage(change: Callable[[Piece], None], state: Mapping[str, Any], engine: Any) -> None:
    checkpoint = engine.parts.checkpoint
    real = checkpoint.open
    checkpoint.open = lambda directory, tag: Damaged(real(directory, tag), change, state)


def nothing(piece: Piece) -> None:
    """Change only the state."""


@torch.no_grad()
def flip_a_bit(piece: Piece) -> None:
    if (piece.of.kind, piece.of.name) == ("exp_avg", "inner.weight"):
        piece.data.view(-1).view(torch.int32)[0] ^= 1


@torch.no_grad()
def round_masters(piece: Piece) -> None:
    if piece.of.kind in (MASTER, WEIGHT):
        piece.data.copy_(piece.data.bfloat16())


@torch.no_grad()
def swap_halves(piece: Piece) -> None:
    """What two ranks would have that read each other's chunks."""
    if (piece.of.kind, piece.of.name) == ("exp_avg_sq", "inner.weight"):
        flat = piece.data.view(-1)
        flat.copy_(flat.roll(flat.numel() // 2))


@torch.no_grad()
def on_the_last_rank(piece: Piece) -> None:
    if piece.of.name == "outer.weight" and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        piece.data.mul_(1 + 2**-20)


@torch.no_grad()
def count_on(piece: Piece) -> None:
    if piece.of.kind == "step":
        piece.data.add_(1)


def forget_the_scaler(engine: Any) -> None:
    damage(nothing, {"precision": "another"}, engine)


def forget_slots(engine: Any) -> None:
    for state in engine.basic_optimizer.state.values():
        state["exp_avg"].zero_()


def lose_a_gradient(engine: Any) -> None:
    """The first rank's share of each gradient counts twice from now on."""
    if torch.distributed.get_rank() == 0:
        backward = engine.backward
        engine.backward = lambda loss: backward(loss * 2)


def repeat_samples(engine: Any) -> None:
    loader = engine.training_dataloader
    loader.load_state_dict({**loader.state_dict(), "consumed_samples": 0})


def lower_the_rate(engine: Any) -> None:
    for group in engine.basic_optimizer.param_groups:
        group["weight_decay"] = 0.2


@dataclass(frozen=True)
class Defect:
    expected: str
    before_load: Callable[[Any], None] | None = None
    before_steps: Callable[[Any], None] | None = None
    precision: str = "fp32"


DEFECTS = {
    "a bit of a slot": Defect("loaded: exp_avg inner.weight", partial(damage, flip_a_bit, {})),
    "rounded masters": Defect("loaded: weight outer.weight", partial(damage, round_masters, {})),
    "swapped chunks": Defect("loaded: exp_avg_sq inner.weight", partial(damage, swap_halves, {})),
    "one rank off": Defect("has another weight outer.weight", partial(damage, on_the_last_rank, {})),
    "a step counted twice": Defect("loaded: step inner.weight", partial(damage, count_on, {})),
    "no schedule": Defect("loaded: schedule", partial(damage, nothing, {"schedule": None})),
    "no data position": Defect("loaded: data", partial(damage, nothing, {"data": None})),
    "no generators": Defect("loaded: the random generator", partial(damage, nothing, {"rng": None})),
    "no scaler": Defect("loaded: scaler", forget_the_scaler, precision="fp16"),
    "slots not used": Defect("end: ", before_steps=forget_slots),
    "a gradient counted twice": Defect("end: ", before_steps=lose_a_gradient),
    "samples repeated": Defect("steps: a loss", before_steps=repeat_samples),
    "samples repeated in low precision": Defect("steps: a loss", before_steps=repeat_samples, precision="bf16"),
    "an option changed": Defect("end: groups", before_steps=lower_the_rate),
}


def with_defect(defect: Defect) -> Case:
    """Return a case with it: written on one rank and read on two, where bounds leave room for it to hide."""
    source = places()[0]
    target = replace(source, world_size=source.world_size if "generator" in defect.expected else 2)
    return Case(source, target, defect.precision, before_load=defect.before_load, before_steps=defect.before_steps)


# -- tests -------------------------------------------------------------------------------------------------------------


def test_what_is_installed_has_a_row():
    assert [name for name in registry.names("partition") if name not in PARTITIONS] == []
    assert [name for name in registry.names("checkpoint") if name not in READS] == []
    assert [name for name in registry.names("precision") if name not in PRECISIONS] == []


@pytest.mark.parametrize("setup", SETUPS[:2])
def test_bounds_assume_what_is_so(setup, one_process):  # noqa: F811
    found = anywhere.assumptions(setup)
    # Half of what is assumed would make the bounds twice too wide, or more.
    assert going_on.CURVATURE / 2 < found["curvature"] <= going_on.CURVATURE
    assert going_on.SLOPE / 2 < found["slope"] <= going_on.SLOPE
    assert found["gradient"] < 1
    assert found["weight"] < 1
    assert found["norm"] < 0.5


@pytest.fixture(scope="module")
def covered(tmp_path_factory) -> dict[str, list[tuple[Case, list[str]]]]:
    """Everything but the long products, in one spawn: cases and what is wrong with them."""
    defects = [with_defect(defect) for defect in DEFECTS.values() if defect.precision in precisions()]
    groups = {
        "pairs": [case_of(row) for row in pairwise(factors())],
        "windows": in_windows(),
        "today": todays(),
        "defects": defects,
    }
    cases = [case for group in groups.values() for case in group]
    found = iter(zip(cases, anywhere.run(cases, tmp_path_factory.mktemp("anywhere")), strict=True))
    return {name: [next(found) for _ in group] for name, group in groups.items()}


def wrong(found: Iterable[tuple[Case, list[str]]]) -> list[str]:
    return [f"{case}: {problem}" for case, problems in found for problem in problems[:5]]


@pytest.mark.parametrize("group", ["pairs", "windows"])
def test_every_pair_of_values(covered, group):
    assert wrong(covered[group]) == []


def test_cases_drawn_today(covered):
    assert wrong(covered["today"]) == [], f"drawn by DS_MATRIX_SEED={seed_of_today()}"


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_seen(covered, name):
    if DEFECTS[name].precision not in precisions():
        pytest.skip(f"{DEFECTS[name].precision} is not installed")
    names = [name for name, defect in DEFECTS.items() if defect.precision in precisions()]
    _, problems = covered["defects"][names.index(name)]
    assert any(DEFECTS[name].expected in problem for problem in problems), problems


@pytest.mark.slow
@pytest.mark.timeout(13000)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_place_writes_and_reads(precision, tmp_path):
    if precision not in precisions():
        pytest.skip(f"{precision} is not installed")
    cases = list(every_case(precision))
    assert wrong(zip(cases, anywhere.run(cases, tmp_path, timeout_s=1200), strict=True)) == []
