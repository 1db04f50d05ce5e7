"""What may befall one step of training in low precision on one rank, and whether every rank answers rightly (P03).

A scenario is a factor beside those of :data:`ds_core.testing.low_precision.FACTORS`. After an inf or NaN on one rank
all ranks skip the step together: weights, masters and optimizer state stay bit for bit, gradients are gone, the record
names the parameter, its module and the rank, and the steps after it are those of plain PyTorch that never had it. A
gradient that is zero is a step like any other.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten

from ds_core import comm
from ds_core.testing.low_precision import FACTORS, Scaler, case_of, differences, emulate, shared_out
from ds_core.testing.reference import BATCH_NORM, MIXED_MODELS, SCALE_POWER, Case, micro_batch, train

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from ds_core.testing.reference import Trace

__all__ = ["INCIDENTS", "INCIDENT_FACTORS", "Incident", "Watch", "incident_case", "poison", "wrong_incidents"]


@dataclass(frozen=True)
class Incident:
    """What happens to one gradient of one rank."""

    step: int
    rank: int
    """Its place in a list of all, so -1 is the last."""
    micro: int
    """The same, of the micro-batches."""
    parameter: str
    value: float
    is_alone: bool = False
    """In this step that micro-batch of that rank alone uses the parameter."""


ZERO_STEP = 1
INCIDENTS: dict[str, Incident | None] = {
    "none": None,
    "inf at the first micro-batch": Incident(1, -1, 0, "block.weight", math.inf),
    "inf at the last micro-batch": Incident(1, 0, -1, "block.weight", -math.inf),
    "NaN in a parameter of one rank alone": Incident(0, -1, -1, "sometimes.weight", math.nan, is_alone=True),
    "zero gradient": None,
}
INCIDENT_FACTORS: dict[str, tuple[Any, ...]] = {"scenario": tuple(INCIDENTS), **FACTORS}
_HAVE_SOMETIMES = ("unused", "all", "all_mixed", BATCH_NORM)


def incident_case(row: Mapping[str, Any]) -> tuple[str, Case]:
    """Return scenario and case of a combination of ``INCIDENT_FACTORS``, or the nearest that there is.

    A parameter that one rank alone uses needs a model that has one.
    """
    scenario = row["scenario"]
    case = case_of({name: value for name, value in row.items() if name != "scenario"})
    incident = INCIDENTS[scenario]
    if incident is not None and incident.is_alone and case.model not in _HAVE_SOMETIMES:
        case = replace(case, model="all_mixed" if case.model in MIXED_MODELS else "all")
    return scenario, case


def poison(engine: Any, parameter: str, value: float) -> None:
    """Make the next gradient of ``parameter`` be ``value`` in its last element, on this rank."""

    def hook(gradient: Tensor) -> Tensor:
        handle.remove()
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value
        return gradient

    handle = engine.module.get_parameter(parameter).register_hook(hook)


class Watch:
    """Brings a scenario about in one training, and compares what came of it. On every rank of the process group."""

    def __init__(self, scenario: str, case: Case, *, happens: bool = True) -> None:
        """``happens``: False to show that the comparison notices."""
        self._happens = happens
        self.case, self.incident = case, INCIDENTS[scenario]
        self.zero = {ZERO_STEP} if scenario == "zero gradient" else set[int]()
        self.world_size = comm.get_world_size()
        self.records: Any = ()
        self.problems: list[str] = []
        self._step = 0
        self._state: Any = None

    @property
    def rank(self) -> int:
        assert self.incident is not None
        return self.incident.rank % self.world_size

    def data(self, step: int, micro: int, rank: int) -> tuple[Tensor, bool]:
        tokens, use_sometimes = micro_batch(step, micro, rank)
        incident = self.incident
        if incident is not None and incident.is_alone and step == incident.step:
            use_sometimes = self._is_here(step, micro, rank)
        return tokens, use_sometimes

    def _is_here(self, step: int, micro: int, rank: int) -> bool:
        incident = self.incident
        here = (step, micro, rank)
        return incident is not None and here == (incident.step, incident.micro % self.case.accumulation, self.rank)

    def before_backward(self, engine: Any, step: int, micro: int) -> None:
        self._step, self.records = step, engine.overflows
        if self._happens and self._is_here(step, micro, comm.get_rank()):
            assert self.incident is not None
            poison(engine, self.incident.parameter, self.incident.value)
        if self.incident is None or micro != 0:
            return
        if step == self.incident.step:
            self._state = copy.deepcopy(engine.basic_optimizer.state_dict())
        elif step == self.incident.step + 1:
            if not _equal(self._state, engine.basic_optimizer.state_dict()):
                self.problems.append("the skipped step moved the optimizer's state")
            left = [name for name, param in engine.module.named_parameters() if param.grad is not None]
            if left:
                self.problems.append(f"the skipped step left gradients of {left}")

    def tamper(self, loss: Tensor) -> Tensor:
        return loss * 0.0 if self._happens and self._step in self.zero else loss

    def train(self, config: Mapping[str, Any] | None = None, **how: Any) -> Trace:
        """Train as :func:`ds_core.testing.reference.train` does."""
        sections: dict[str, Any] = {}
        if self.case.precision == "fp16":
            # A hysteresis of 1, so that the scale falls at the only overflow.
            sections["fp16"] = {**self.case.config["fp16"], "hysteresis": 1}
        return train(
            self.case,
            {**sections, **(config or {})},
            tamper=self.tamper,
            before_backward=self.before_backward,
            data=self.data,
            **how,
        )

    def compare(self, mine: Trace) -> list[str]:
        """Return what is not as it should be, in words; empty when all is right."""
        incident = self.incident
        scaler = Scaler(2.0**SCALE_POWER, window=1, hysteresis=1) if self.case.precision == "fp16" else None
        never = () if incident is None else (incident.step,)
        expected = emulate(
            self.case,
            self.world_size,
            comm.get_rank(),
            follow=mine,
            never=never,
            zero=self.zero,
            data=self.data,
            scaler=scaler,
        )
        found = self.problems + differences(mine, expected)
        if expected.skipped != [step in never for step in range(len(expected.skipped))]:
            found.append("another step overflowed in plain PyTorch too, so its gradients were not compared")
        if self.zero and mine.norms[ZERO_STEP] != 0.0:
            found.append(f"the norm of a gradient of zero is {mine.norms[ZERO_STEP]}")
        if incident is not None:
            found += _moved(mine, incident.step)
        return found + self._record_problems(mine)

    def _record_problems(self, mine: Trace) -> list[str]:
        incident, want = self.incident, []
        if incident is not None:
            module = incident.parameter.partition(".")[0]
            scale = mine.scales[incident.step]
            want = [(incident.step + 1, scale, incident.parameter, module, "Linear", (self.rank,), True)]
        got = [(r.step, r.scale, r.parameter, r.module, r.module_type, r.ranks, r.skipped) for r in self.records]
        return [] if got == want else [f"records of overflows are {got}, expected {want}"]


def _moved(mine: Trace, step: int) -> list[str]:
    found = []
    kinds = (("weight", mine.start_weights, mine.weights), ("master", mine.start_masters, mine.masters))
    for what, start, after in kinds:
        before = start if step == 0 else after[step - 1]
        for name, value in before.items():
            if not torch.equal(value, after[step][name]):
                found.append(f"the skipped step moved {what} {name}")
    return found


def _equal(a: Any, b: Any) -> bool:
    """Return whether two states are equal, tensors bit for bit."""
    (mine, form), (others, other_form) = tree_flatten(a), tree_flatten(b)
    return form == other_form and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(mine, others, strict=True)
    )


def wrong_incidents(
    cases: Iterable[tuple[str, Case]], config: Mapping[str, Any] | None = None, **how: Any
) -> dict[str, list[str]]:
    """Train every case under its scenario on every rank of the process group; return those that are off, with what is.

    Args:
        cases: names of ``INCIDENTS``, each with what is trained; the same on every rank.
        config: sections to add, see :func:`ds_core.testing.reference.train`.
        how: ``weights``, as there.
    """
    trained = []
    for scenario, case in cases:
        watch = Watch(scenario, case)
        trace = watch.train(config, **how)
        trained.append((f"{scenario}: {case}", trace, partial(watch.compare, trace)))
    return shared_out(trained)
