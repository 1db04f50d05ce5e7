"""Golden tables of the warmup schedules: the rates after 0, 1, 2, ... steps."""

from __future__ import annotations

import logging
import math
import pickle
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ds_core import log
from ds_core.errors import ConfigError
from ds_core.schedules import NotSteppedError, WarmupCosineLR, WarmupDecayLR, WarmupLR

if TYPE_CHECKING:
    from collections.abc import Callable

BASES = (0.5, 0.02)
"""Rates of the two parameter groups at construction."""


@pytest.fixture(autouse=True)
def _audible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    log.reset()


def _optimizer(*lrs: float, tensor: bool = False) -> torch.optim.Optimizer:
    groups = [{"params": [torch.zeros(2)], "lr": torch.tensor(lr, dtype=torch.float64) if tensor else lr} for lr in lrs]
    return torch.optim.Adam(groups, capturable=tensor)


def _table(schedule: Any, steps: int) -> list[list[float]]:
    """Return the rates found in the optimizer after 0, 1, ..., ``steps`` steps."""
    rows = [[float(group["lr"]) for group in schedule.optimizer.param_groups]]
    for _ in range(steps):
        schedule.step()
        rows.append([float(group["lr"]) for group in schedule.optimizer.param_groups])
    return rows


def _first_group(schedule: Any, steps: int) -> list[float]:
    return [row[0] for row in _table(schedule, steps)]


# The formulas of the specification, written as it prints them and apart from the code they test.


def _warmup(t: int, w: int, kind: str) -> float:
    return math.log(t + 1) / math.log(w) if kind == "log" else t / w


def _warmup_lr(t: int, low: float, high: float, num: int, kind: str) -> float:
    w = max(2, num)
    if t < 0:
        return low
    return low + (high - low) * (_warmup(t, w, kind) if t < w else 1.0)


def _decay_lr(t: int, low: float, high: float, num: int, kind: str, total: int) -> float:
    w = max(2, num)
    if t < w:
        return _warmup_lr(t, low, high, num, kind)
    return low + (high - low) * max(0.0, (total - t) / max(1, total - w))


def _cosine_lr(t: int, base: float, mr: float, cmr: float, num: int, kind: str, total: int) -> float:
    w = max(2, num)
    if t < 0:
        return 0.0
    if t < w:
        return base * (mr + (1 - mr) * _warmup(t, w, kind))
    p = min(1.0, (t - w + 1) / max(1, total - w))
    return base * (cmr + (1 - cmr) * (1 + math.cos(math.pi * p)) / 2)


# What DeepSpeed 0.19.6 gives: linear, W = 4, maximum 1, T = 8.


def test_reference_values_of_warmup_lr() -> None:
    linear = WarmupLR(_optimizer(1.0), warmup_max_lr=1.0, warmup_num_steps=4, warmup_type="linear")
    assert _first_group(linear, 6) == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1])
    log = WarmupLR(_optimizer(1.0), warmup_max_lr=1.0, warmup_num_steps=4)
    assert _first_group(log, 4) == pytest.approx([0, 0, 0.5, 0.7925, 1], abs=5e-5)


def test_reference_values_of_warmup_decay_lr() -> None:
    schedule = WarmupDecayLR(_optimizer(1.0), 8, warmup_max_lr=1.0, warmup_num_steps=4, warmup_type="linear")
    assert _first_group(schedule, 9) == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0])


def test_reference_values_of_warmup_cosine_lr() -> None:
    schedule = WarmupCosineLR(_optimizer(0.5), 8, warmup_num_steps=4, cos_min_ratio=0.1, warmup_type="linear")
    expected = [0, 0, 0.125, 0.25, 0.375, 0.4341, 0.275, 0.1159, 0.05]
    assert _first_group(schedule, 8) == pytest.approx(expected, abs=5e-5)


def test_defaults() -> None:
    warmup = WarmupLR(_optimizer(*BASES))
    assert _table(warmup, 2000)[-1] == pytest.approx(BASES)
    assert _table(WarmupLR(_optimizer(*BASES)), 500)[-1][0] == pytest.approx(_warmup_lr(499, 0, 0.5, 1000, "log"))
    decay = WarmupDecayLR(_optimizer(*BASES), 2000)
    assert max(row[1] for row in _table(decay, 2100)) == pytest.approx(0.001)
    assert decay.get_last_lr() == [0.0, 0.0]
    cosine = WarmupCosineLR(_optimizer(*BASES), 2000)
    assert _table(cosine, 2100)[-1] == pytest.approx([base * 1e-4 for base in BASES])


# The same tables from the formulas: all groups, every length of the warmup, both shapes.

KINDS = ["log", "linear"]
WARMUPS = [1, 2, 3, 7]
STEPS = 16
TOTAL = 12


def _schedules(num: int, kind: str) -> dict[str, tuple[Callable[..., Any], Callable[[int, int], float]]]:
    """Return name -> (optimizer -> schedule, (t, group) -> rate)."""
    lows, highs = [0.01, 0.002], [0.3, 0.04]
    shape = {"warmup_num_steps": num, "warmup_type": kind}
    return {
        "WarmupLR": (
            lambda optimizer, **more: WarmupLR(optimizer, lows, highs, **shape, **more),
            lambda t, g: _warmup_lr(t, lows[g], highs[g], num, kind),
        ),
        "WarmupLR of the groups' rates": (
            lambda optimizer, **more: WarmupLR(optimizer, 0.001, **shape, **more),
            lambda t, g: _warmup_lr(t, 0.001, BASES[g], num, kind),
        ),
        "WarmupDecayLR": (
            lambda optimizer, **more: WarmupDecayLR(optimizer, TOTAL, lows, highs, **shape, **more),
            lambda t, g: _decay_lr(t, lows[g], highs[g], num, kind, TOTAL),
        ),
        "WarmupDecayLR shorter than its warmup": (
            lambda optimizer, **more: WarmupDecayLR(optimizer, 1, lows, highs, **shape, **more),
            lambda t, g: _decay_lr(t, lows[g], highs[g], num, kind, 1),
        ),
        "WarmupCosineLR": (
            lambda optimizer, **more: WarmupCosineLR(optimizer, TOTAL, 0.2, cos_min_ratio=0.05, **shape, **more),
            lambda t, g: _cosine_lr(t, BASES[g], 0.2, 0.05, num, kind, TOTAL),
        ),
    }


NAMES = list(_schedules(2, "log"))


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num", WARMUPS)
@pytest.mark.parametrize("name", NAMES)
def test_golden_table(name: str, num: int, kind: str, tensor: bool) -> None:
    build, formula = _schedules(num, kind)[name]
    optimizer = _optimizer(*BASES, tensor=tensor)
    held = [group["lr"] for group in optimizer.param_groups]
    schedule = build(optimizer)
    for row, rates in enumerate(_table(schedule, STEPS)):
        # Row k is t = k-1. The arithmetic is the same in another order: a few units in the last place.
        assert rates == pytest.approx([formula(row - 1, group) for group in range(2)], rel=1e-14, abs=1e-18)
    assert schedule.get_last_lr() == schedule.get_lr() == pytest.approx(rates, rel=0, abs=0)
    if tensor:
        assert all(group["lr"] is tensor_lr for group, tensor_lr in zip(optimizer.param_groups, held, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_resume_at_every_step(name: str) -> None:
    build, _ = _schedules(3, "log")[name]
    whole = _table(build(_optimizer(*BASES)), STEPS)
    for stop in range(STEPS + 1):
        first = build(_optimizer(*BASES))
        _table(first, stop)
        state = pickle.loads(pickle.dumps([first.state_dict(), first.optimizer.state_dict()]))
        second = build(_optimizer(*BASES))
        untouched = _table(second, 0)
        second.load_state_dict(state[0])
        assert _table(second, 0) == untouched  # the rates come back with the optimizer
        second.optimizer.load_state_dict(state[1])
        assert second.get_last_lr() == first.get_last_lr() == whole[stop]
        assert _table(second, STEPS - stop) == whole[stop:]


@pytest.mark.parametrize("name", NAMES)
def test_going_on_from_a_given_counter(name: str) -> None:
    build, formula = _schedules(3, "linear")[name]
    optimizer = _optimizer(*BASES)
    schedule = build(optimizer, last_batch_iteration=5)
    assert [group["lr"] for group in optimizer.param_groups] == list(BASES)
    with pytest.raises(NotSteppedError, match="need to call step"):
        schedule.get_last_lr()
    with pytest.raises(AssertionError, match="need to call step"):
        schedule.get_last_lr()
    assert schedule.get_lr() == pytest.approx([formula(5, group) for group in range(2)])
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([formula(6, group) for group in range(2)])


def test_state_is_the_counter() -> None:
    schedule = WarmupLR(_optimizer(1.0), warmup_num_steps=20)
    assert schedule.state_dict() == {"last_batch_iteration": -1}
    schedule.step()
    schedule.step()
    assert schedule.state_dict() == {"last_batch_iteration": 1}


def test_step_to_a_given_counter() -> None:
    schedule = WarmupLR(_optimizer(1.0), warmup_num_steps=20, warmup_type="linear")
    schedule.step(10)
    assert schedule.get_last_lr() == [0.5]
    schedule.step()
    assert schedule.get_last_lr() == [0.55]


def test_skipped_updates_hold_the_rate() -> None:
    """An engine does not step the schedule for a skipped update: the next update runs at the same rate."""
    schedule = WarmupLR(_optimizer(1.0), warmup_num_steps=4, warmup_type="linear")
    used = []
    for skipped in (False, False, True, False, True, True, False):
        used.append(schedule.get_last_lr()[0])
        if not skipped:
            schedule.step()
    assert used == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.5]


def test_a_wrapped_optimizer() -> None:
    class Wrapper:
        optimizer = _optimizer(1.0)

    assert WarmupLR(Wrapper(), warmup_num_steps=20).optimizer is Wrapper.optimizer
    with pytest.raises(TypeError, match=r"object is not a torch optimizer, and neither is its \.optimizer"):
        WarmupLR(object())


@pytest.mark.parametrize("make", [WarmupLR, lambda o, **k: WarmupDecayLR(o, 9, **k)], ids=["WarmupLR", "WarmupDecayLR"])
@pytest.mark.parametrize("name", ["warmup_min_lr", "warmup_max_lr"])
def test_a_list_needs_one_value_per_group(make: Callable[..., Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has 3 values, the optimizer has 2 parameter groups"):
        make(_optimizer(*BASES), **{name: [0.1, 0.2, 0.3]})


@pytest.mark.parametrize(
    ("make", "name"),
    [(WarmupLR, "warmup_num_steps"), (WarmupDecayLR, "total_num_steps"), (WarmupCosineLR, "total_num_steps")],
)
@pytest.mark.parametrize("value", [0, -1, 4.0, True, "4"])
def test_numbers_of_steps_are_positive_ints(make: Callable[..., Any], name: str, value: object) -> None:
    optimizer = _optimizer(*BASES)
    with pytest.raises(ValueError, match=f"{name} is {value!r}, expected an int of at least 1"):
        make(optimizer, **{name: value})
    assert [group["lr"] for group in optimizer.param_groups] == list(BASES)


@pytest.mark.parametrize("value", ["0.1", None, True, math.nan, math.inf])
def test_rates_are_finite_numbers(value: object) -> None:
    with pytest.raises(ConfigError, match="expected a finite number"):
        WarmupLR(_optimizer(1.0), warmup_min_lr=value)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected a finite number"):
        WarmupCosineLR(_optimizer(1.0), 9, cos_min_ratio=value)  # type: ignore[arg-type]


def test_an_unknown_warmup_type_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"(?s)'lineer', allowed are log, linear.*did you mean 'linear'"):
        WarmupLR(_optimizer(1.0), warmup_type="lineer")


def test_a_schedule_shorter_than_its_warmup_is_said(caplog: pytest.LogCaptureFixture) -> None:
    WarmupDecayLR(_optimizer(1.0), 50, warmup_num_steps=100)
    WarmupCosineLR(_optimizer(1.0), 50, warmup_num_steps=100)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert all("total_num_steps 50 is less than warmup_num_steps 100" in text for text in caplog.messages)


def test_updates_lost_in_a_short_warmup_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    WarmupLR(_optimizer(1.0), warmup_num_steps=5)
    assert caplog.messages == ["WarmupLR: the first two of 5 warmup steps run at learning rate 0"]
    caplog.clear()
    WarmupLR(_optimizer(1.0), warmup_num_steps=1000)
    WarmupLR(_optimizer(1.0), warmup_min_lr=1e-5, warmup_num_steps=5)
    WarmupCosineLR(_optimizer(1.0), 100, warmup_min_ratio=0.1, warmup_num_steps=5)
    WarmupLR(_optimizer(1.0), warmup_num_steps=5, last_batch_iteration=7)
    assert caplog.messages == []


def test_groups_that_come_later_are_driven_as_the_first():
    def optimizers():
        tensors = [torch.zeros(1), torch.zeros(1)]
        return torch.optim.SGD([{"params": tensors[:1], "lr": 0.5}]), {"params": tensors[1:], "lr": 0.25}

    for make in (
        partial(WarmupLR, warmup_num_steps=4),
        partial(WarmupDecayLR, total_num_steps=8, warmup_num_steps=4),
        partial(WarmupCosineLR, total_num_steps=8, warmup_num_steps=4),
    ):
        rates = []
        for later in (False, True):
            optimizer, group = optimizers()
            if not later:
                optimizer.add_param_group(group)
            schedule = make(optimizer)
            if later:
                optimizer.add_param_group(group)
                schedule.follow_groups()
            rates.append([])
            for _ in range(6):
                rates[-1].append([group["lr"] for group in optimizer.param_groups])
                schedule.step()
        assert rates[0] == rates[1]
    one_each = WarmupLR(optimizers()[0], warmup_max_lr=[0.5])
    one_each.optimizer.add_param_group(optimizers()[1])
    with pytest.raises(ConfigError, match="warmup_max_lr has 1 values, the optimizer has 2 parameter groups"):
        one_each.follow_groups()
