"""The dynamic scale, step by step: written tables, and the same rule told another way.

The tables were worked out by hand from spec/fp16.md section 4. What one needs to check a line:

- Good steps since the last overflow (or the start) have numbers 0, 1, 2, ...; the scale doubles at numbers W, 2W, 3W,
  ... (W is the window). So the first doubling takes W + 1 good steps, each further one W.
- An overflow with hysteresis above 1 takes one off; with 1 it halves the scale, not below the minimum, and at the
  minimum it is an error.
- Hysteresis is given back by a doubling, or by each good step where it is consecutive.

The code under test counts by ``cur_iter`` and ``last_overflow_iter``; the oracle below reads a history run by run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_core.errors import LossScaleError
from ds_core.interfaces import precision as interfaces
from ds_fp16.loss_scaler import DynamicLossScaler, LossScaleConfig

RAISES = "raises"


@dataclass(frozen=True)
class Trace:
    """One sequence: settings, what happened, and what must be true after each step."""

    hysteresis: int
    consecutive: bool
    window: int
    start: float
    minimum: float
    steps: str
    """``1`` is an overflow, ``0`` a step without; ``0*3`` is three of them."""
    expected: str
    """``scale,hysteresis`` after each step; ``8,1*3`` is that three times. ``raises`` comes last."""

    @property
    def outcomes(self) -> list[bool]:
        return [word == "1" for word in expand(self.steps)]

    @property
    def states(self) -> list[tuple[float, int] | str]:
        return [word if word == RAISES else state(word) for word in expand(self.expected)]

    def args(self) -> dict[str, object]:
        return {
            "init_scale": self.start,
            "scale_window": self.window,
            "min_scale": self.minimum,
            "delayed_shift": self.hysteresis,
            "consecutive_hysteresis": self.consecutive,
        }


def expand(text: str) -> list[str]:
    found: list[str] = []
    for word in text.split():
        what, _, times = word.partition("*")
        found += [what] * int(times or 1)
    return found


def state(word: str) -> tuple[float, int]:
    scale, hysteresis = word.split(",")
    return float(scale), int(hysteresis)


# Long lines are one trace each; they are easier to check by eye when they are not wrapped.
# ruff: noqa: E501
TRACES = {
    # The three traces of the spec, observed on DeepSpeed itself.
    "spec, not consecutive": Trace(2, False, 2, 16, 1, "1 1 1 0 0 0 1 1 0", "16,1 8,1 4,1 4,1 4,1 8,2 8,1 4,1 4,1"),
    "spec, consecutive": Trace(2, True, 2, 16, 1, "1 1 1 0 0 0 1 1 0", "16,1 8,1 4,1 4,2 4,2 8,2 8,1 4,1 4,2"),
    "spec, minimum": Trace(1, False, 1000, 4, 1, "1 1 1", "2,1 1,1 raises"),
    # Every combination of hysteresis 1, 2, 4, consecutive or not, and windows 1, 5, 1000.
    "1 w1": Trace(1, False, 1, 8, 1, "0 0 0 1 0 0 1 1 0 0 0", "8,1 16,1 32,1 16,1 16,1 32,1 16,1 8,1 8,1 16,1 32,1"),
    "1 w1 consecutive": Trace(1, True, 1, 1024, 1, "1 0 0 1 0 1 0 0 0 0", "512,1 512,1 1024,1 512,1 512,1 256,1 256,1 512,1 1024,1 2048,1"),
    "1 w5": Trace(1, False, 5, 64, 1, "0*6 1 0*11 1", "64,1*5 128,1 64,1 64,1*5 128,1*5 256,1 128,1"),
    "1 w5 consecutive, minimum": Trace(1, True, 5, 64, 16, "1 1 0*5 1", "32,1 16,1 16,1*5 raises"),
    "1 w1000": Trace(1, False, 1000, 65536, 1, "0*1001 1 0*2001", "65536,1*1000 131072,1 65536,1 65536,1*1000 131072,1*1000 262144,1"),
    "1 w1000 consecutive, minimum": Trace(1, True, 1000, 256, 64, "0*1000 1 0*1000 1 0*1001 1 1", "256,1*1000 128,1 128,1*1000 64,1 64,1*1000 128,1 64,1 raises"),
    "2 w1": Trace(2, False, 1, 32, 1, "1 0 1 1 0 0 1 1 0 0 0", "32,1 32,1 16,1 8,1 8,1 16,2 16,1 8,1 8,1 16,2 32,2"),
    "2 w1 consecutive": Trace(2, True, 1, 32, 1, "1 0 1 1 0 1 0 0 1", "32,1 32,2 32,1 16,1 16,2 16,1 16,2 32,2 32,1"),
    "2 w5, minimum": Trace(2, False, 5, 16, 4, "1 0*5 1 0*6 1*4", "16,1 16,1*5 8,1 8,1*5 16,2 16,1 8,1 4,1 raises"),
    "2 w5 consecutive, minimum": Trace(2, True, 5, 16, 4, "1 0 1 0 1 1 0*6 1*4", "16,1 16,2 16,1 16,2 16,1 8,1 8,2*5 16,2 16,1 8,1 4,1 raises"),
    "2 w1000": Trace(2, False, 1000, 4096, 1, "1 0*1000 1 0*1001 1 0*2000 1", "4096,1 4096,1*1000 2048,1 2048,1*1000 4096,2 4096,1 4096,1*1000 8192,2*1000 8192,1"),
    "2 w1000 consecutive, minimum": Trace(2, True, 1000, 4096, 2048, "1 0 1 1 0*1001 1*3", "4096,1 4096,2 4096,1 2048,1 2048,2*1000 4096,2 4096,1 2048,1 raises"),
    "4 w1": Trace(4, False, 1, 128, 1, "1*5 0 1 0*3 1*4", "128,3 128,2 128,1 64,1 32,1 32,1 16,1 16,1 32,4 64,4 64,3 64,2 64,1 32,1"),
    "4 w1 consecutive": Trace(4, True, 1, 128, 1, "1*3 0 1*4 0 1 0 0", "128,3 128,2 128,1 128,4 128,3 128,2 128,1 64,1 64,4 64,3 64,4 128,4"),
    "4 w5, starts at the minimum": Trace(4, False, 5, 8, 8, "1*3 0*6 1*5", "8,3 8,2 8,1 8,1*5 16,4 16,3 16,2 16,1 8,1 raises"),
    "4 w5 consecutive": Trace(4, True, 5, 32, 2, "0*6 1*3 0 1*5 0*6", "32,4*5 64,4 64,3 64,2 64,1 64,4 64,3 64,2 64,1 32,1 16,1 16,4*5 32,4"),
    "4 w1000": Trace(4, False, 1000, 512, 1, "1 1 0*1001 1*5 0*1000 1 0*1001", "512,3 512,2 512,2*1000 1024,4 1024,3 1024,2 1024,1 512,1 256,1 256,1*1000 128,1 128,1*1000 256,4"),
    "4 w1000 consecutive, at the minimum with hysteresis left": Trace(4, True, 1000, 2, 1, "1*4 0 1*3 0*1001 1", "2,3 2,2 2,1 1,1 1,4 1,3 1,2 1,1 1,4*1000 2,4 2,3"),
    # Corners.
    "only good steps": Trace(2, False, 1, 1, 1, "0*6", "1,2 2,2 4,2 8,2 16,2 32,2"),
    "the minimum is no half": Trace(1, False, 5, 10, 4, "1 1 1", "5,1 4,1 raises"),
    "fp32 cannot hold the double": Trace(2, False, 1, 2**126, 1, "0*4 1 0*2", f"{2**126},2 {2**127},2 {2**127},2*2 {2**127},1 {2**127},1 {2**127},2"),
}  # fmt: skip


# The deadline of hypothesis would measure the machine.
anywhere = settings(deadline=None)
every_trace = pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES)


def run(scaler: DynamicLossScaler, trace: Trace, tell: Any = DynamicLossScaler.update_scale) -> list[Any]:
    """Return scale and hysteresis after each step of ``trace``, which ``tell`` tells ``scaler``."""
    found: list[tuple[float, int] | str] = []
    for overflow in trace.outcomes:
        try:
            tell(scaler, overflow)
        except LossScaleError:
            found.append(RAISES)
        else:
            found.append((scaler.cur_scale, scaler.cur_hysteresis))
    return found


def test_the_tables_cover_what_they_should() -> None:
    assert len(TRACES) >= 20
    covered = {(trace.hysteresis, trace.consecutive, trace.window) for trace in TRACES.values()}
    assert set(product((1, 2, 4), (False, True), (1, 5, 1000))) <= covered
    assert sum(RAISES in trace.states for trace in TRACES.values()) >= 5


@every_trace
def test_the_trace_is_as_written(trace: Trace) -> None:
    assert run(DynamicLossScaler(**trace.args()), trace) == trace.states


@every_trace
def test_the_seam_has_the_same_rule(trace: Trace) -> None:
    scaler = DynamicLossScaler(**trace.args())
    assert run(scaler, trace, lambda scaler, overflow: scaler.update(overflowed=overflow)) == trace.states
    assert isinstance(scaler, interfaces.LossScaler)


@every_trace
def test_stage_0_has_the_same_rule(trace: Trace) -> None:
    config = LossScaleConfig(torch.float16, True, 1.0, trace.args())
    shown = []

    def tell(scaler: DynamicLossScaler, overflow: bool) -> None:
        scaler.update_scale(overflow)
        shown.append((config.cur_scale, config.cur_iter))

    assert run(config.scaler, trace, tell) == trace.states
    steps = [word for word in trace.states if word != RAISES]
    assert shown == [(scale, number + 1) for number, (scale, _) in enumerate(steps)]


@every_trace
def test_a_scaler_that_is_saved_and_loaded_goes_on(trace: Trace) -> None:
    scaler = DynamicLossScaler(**trace.args())

    def tell(scaler: DynamicLossScaler, overflow: bool) -> None:
        if scaler.cur_iter % 7 == 3:
            saved = json.dumps(scaler.state_dict())
            vars(scaler).clear()
            scaler.__init__(**trace.args())
            scaler.load_state_dict(json.loads(saved))
        scaler.update_scale(overflow)

    assert run(scaler, trace, tell) == trace.states


@every_trace
def test_without_the_error_the_scale_stays_at_the_minimum(trace: Trace) -> None:
    expected = [trace.states[number - 1] if word == RAISES else word for number, word in enumerate(trace.states)]
    assert run(DynamicLossScaler(**trace.args(), raise_error_at_min_scale=False), trace) == expected


def oracle(
    outcomes: list[bool], *, start: float, minimum: float, window: int, hysteresis: int, consecutive: bool
) -> tuple[float, int] | str:
    """Return scale and hysteresis after ``outcomes``, or RAISES; whole runs of equal outcomes at a time."""
    scale, left = start, hysteresis
    for overflow, run_of in groupby(outcomes):
        length = len(list(run_of))
        if overflow:
            absorbed = min(length, left - 1)
            left -= absorbed
            for _ in range(length - absorbed):
                if scale == minimum:
                    return RAISES
                scale = max(scale / 2, minimum)
        else:
            # The first step of the run has number 0 and never doubles; then every `window`-th does.
            doublings = (length - 1) // window
            scale *= 2**doublings
            if doublings or consecutive:
                left = hysteresis
    return scale, left


scalers = st.fixed_dictionaries(
    {
        # Near 2**10, so that no history here reaches what fp32 cannot hold.
        "start": st.sampled_from([1.0, 3.0, 16.0, 1000.0, 1024.0]),
        "minimum": st.sampled_from([0.25, 1.0]),
        "window": st.integers(1, 9),
        "hysteresis": st.integers(1, 5),
        "consecutive": st.booleans(),
    }
)
histories = st.lists(st.tuples(st.booleans(), st.integers(1, 14)), max_size=6).map(
    lambda runs: [outcome for outcome, length in runs for _ in range(length)]
)


def scaler_of(given_to: dict) -> DynamicLossScaler:
    return DynamicLossScaler(
        given_to["start"],
        given_to["window"],
        given_to["minimum"],
        given_to["hysteresis"],
        given_to["consecutive"],
    )


@anywhere
@given(given_to=scalers, outcomes=histories)
def test_it_is_the_rule_told_run_by_run(given_to: dict, outcomes: list[bool]) -> None:
    scaler = scaler_of(given_to)
    found: tuple[float, int] | str = (scaler.cur_scale, scaler.cur_hysteresis)
    for overflow in outcomes:
        try:
            scaler.update_scale(overflow)
        except LossScaleError:
            found = RAISES
            break
        found = (scaler.cur_scale, scaler.cur_hysteresis)
    assert found == oracle(outcomes, **given_to)


@pytest.mark.parametrize("name", [name for name in TRACES if name != "fp32 cannot hold the double"])
def test_the_oracle_agrees_with_the_tables(name: str) -> None:
    trace = TRACES[name]
    for length in {1, len(trace.outcomes) // 2, len(trace.outcomes)}:
        found = oracle(
            trace.outcomes[:length],
            start=trace.start,
            minimum=trace.minimum,
            window=trace.window,
            hysteresis=trace.hysteresis,
            consecutive=trace.consecutive,
        )
        assert found == trace.states[length - 1]


@anywhere
@given(given_to=scalers, outcomes=histories)
def test_what_always_holds(given_to: dict, outcomes: list[bool]) -> None:
    scaler = scaler_of(given_to)
    for number, overflow in enumerate(outcomes):
        before, left = scaler.cur_scale, scaler.cur_hysteresis
        frozen = dict(vars(scaler))
        try:
            scaler.update_scale(overflow)
        except LossScaleError:
            assert overflow
            assert (before, left) == (scaler.min_scale, 1)
            assert vars(scaler) == frozen
            return
        assert scaler.cur_iter == number + 1
        assert scaler.cur_scale >= scaler.min_scale
        assert 1 <= scaler.cur_hysteresis <= scaler.delayed_shift
        if overflow:
            assert scaler.last_overflow_iter == number
            # One step takes from the hysteresis or from the scale, never from both, and never nothing.
            assert (scaler.cur_scale < before) != (scaler.cur_hysteresis < left)
        else:
            assert scaler.cur_scale in (before, 2 * before)
            assert scaler.cur_hysteresis >= left
