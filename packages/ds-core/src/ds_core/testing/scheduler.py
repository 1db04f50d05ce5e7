"""Contract of the seam ``scheduler``; inherit :class:`SchedulerContract` in a plugin's tests."""

from __future__ import annotations

import copy
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ds_core.interfaces.scheduler import LRSchedule, ScheduleFactory

__all__ = ["SchedulerContract"]

STEPS = 12


class SchedulerContract:
    """What every schedule promises."""

    @pytest.fixture
    def factory(self) -> ScheduleFactory:
        """Override: what the entry point names."""
        raise NotImplementedError

    @pytest.fixture
    def params(self) -> dict[str, Any]:
        """Override: ``scheduler.params`` under which the rate changes within 12 steps."""
        raise NotImplementedError

    @pytest.fixture
    def bad_params(self) -> Mapping[str, Any]:
        """Override: a known key with a value that cannot be used."""
        raise NotImplementedError

    def test_every_group_has_a_rate(self, factory: ScheduleFactory, params: dict[str, Any]) -> None:
        optimizer = _optimizer(3)
        schedule = factory(optimizer, **params)
        for _ in range(STEPS):
            rates = schedule.get_last_lr()
            assert len(rates) == 3
            assert all(isinstance(rate, float) and math.isfinite(rate) and rate >= 0 for rate in rates)
            assert rates == _rates(optimizer), "the optimizer uses what the schedule says"
            _advance(optimizer, schedule)

    def test_the_rate_changes(self, factory: ScheduleFactory, params: dict[str, Any]) -> None:
        assert len(set(_sequence(factory, params))) > 1

    def test_the_rate_depends_on_the_steps_alone(self, factory: ScheduleFactory, params: dict[str, Any]) -> None:
        assert _sequence(factory, params) == _sequence(factory, params)

    def test_asking_moves_nothing(self, factory: ScheduleFactory, params: dict[str, Any]) -> None:
        optimizer = _optimizer()
        schedule = factory(optimizer, **params)
        before = schedule.get_last_lr()
        schedule.state_dict()
        assert schedule.get_last_lr() == before == _rates(optimizer)

    def test_only_the_rate_is_touched(self, factory: ScheduleFactory, params: dict[str, Any]) -> None:
        optimizer = _optimizer()
        schedule = factory(optimizer, **params)
        for _ in range(STEPS):
            _advance(optimizer, schedule)
        assert all(group["weight_decay"] == 0.5 and len(group["params"]) == 1 for group in optimizer.param_groups)

    @pytest.mark.parametrize("saved_at", range(STEPS))
    def test_state_continues_exactly(self, factory: ScheduleFactory, params: dict[str, Any], saved_at: int) -> None:
        whole = _sequence(factory, params)
        optimizer = _optimizer()
        schedule = factory(optimizer, **params)
        for _ in range(saved_at):
            _advance(optimizer, schedule)
        state, rates = json.loads(json.dumps(schedule.state_dict())), optimizer.state_dict()
        resumed_optimizer = _optimizer()
        resumed = factory(resumed_optimizer, **params)
        # The order of a load: the optimizer's groups bring their rates, then the schedule its counter.
        resumed_optimizer.load_state_dict(rates)
        resumed.load_state_dict(state)
        for step in range(saved_at, STEPS):
            assert tuple(_rates(resumed_optimizer)) == whole[step]
            if step > saved_at:
                assert tuple(resumed.get_last_lr()) == whole[step]
            _advance(resumed_optimizer, resumed)

    def test_a_state_taken_does_not_move_with_the_schedule(
        self, factory: ScheduleFactory, params: dict[str, Any]
    ) -> None:
        optimizer = _optimizer()
        schedule = factory(optimizer, **params)
        state = schedule.state_dict()
        before = copy.deepcopy(state)
        for _ in range(STEPS):
            _advance(optimizer, schedule)
        assert state == before

    def test_parameters_are_left_as_given(self, factory: ScheduleFactory, params: dict[str, Any]) -> None:
        before = copy.deepcopy(params)
        factory(_optimizer(), **params)
        assert params == before

    def test_an_unknown_key_is_a_type_error(self, factory: ScheduleFactory, params: dict[str, Any]) -> None:
        with pytest.raises(TypeError, match="surely_no_such_key"):
            factory(_optimizer(), **params, surely_no_such_key=1)

    def test_a_bad_value_is_a_value_error(
        self, factory: ScheduleFactory, params: dict[str, Any], bad_params: Mapping[str, Any]
    ) -> None:
        for key, value in bad_params.items():
            with pytest.raises(ValueError, match=key):
                factory(_optimizer(), **{**params, key: value})


def _optimizer(groups: int = 2) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [{"params": [torch.zeros(1)], "lr": 0.5 / (index + 1)} for index in range(groups)], weight_decay=0.5
    )


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def _advance(optimizer: torch.optim.Optimizer, schedule: LRSchedule) -> None:
    # torch's own schedules warn if the optimizer has never stepped.
    optimizer.step()
    schedule.step()


def _sequence(factory: ScheduleFactory, params: Mapping[str, Any]) -> list[tuple[float, ...]]:
    optimizer = _optimizer()
    schedule = factory(optimizer, **params)
    found = []
    for _ in range(STEPS):
        found.append(tuple(_rates(optimizer)))
        _advance(optimizer, schedule)
    return found
