"""scheduler.type and scheduler.params -> a schedule: ds_core.schedules.build_schedule."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ds_core import registry, schedules
from ds_core.errors import ConfigError, NotBuiltError
from ds_core.schedules import build_schedule

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1)], lr=0.5)


def _install(monkeypatch: pytest.MonkeyPatch, name: str, factory: Callable[..., Any]) -> None:
    monkeypatch.setattr(registry, "names", lambda seam: (name,))
    monkeypatch.setattr(registry, "load", lambda seam, name, needed_by=None: factory)


@pytest.mark.parametrize("name", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_our_own(name: str, sgd: torch.optim.Optimizer) -> None:
    params = {"warmup_num_steps": 50} | ({} if name == "WarmupLR" else {"total_num_steps": 100})
    schedule = build_schedule(name, params, sgd)
    assert type(schedule) is getattr(schedules, name)
    assert schedule.get_last_lr() == [0.0]


def test_torchs(sgd: torch.optim.Optimizer) -> None:
    schedule = build_schedule("StepLR", {"step_size": 1, "gamma": 0.5}, sgd)
    assert isinstance(schedule, torch.optim.lr_scheduler.StepLR)
    sgd.step()
    schedule.step()
    assert schedule.get_last_lr() == [0.25]


def test_no_params(sgd: torch.optim.Optimizer) -> None:
    assert build_schedule("WarmupLR", None, sgd).state_dict() == {"last_batch_iteration": -1}


def test_params_are_left_alone(sgd: torch.optim.Optimizer) -> None:
    params = {"warmup_num_steps": 50}
    build_schedule("WarmupLR", params, sgd)
    assert params == {"warmup_num_steps": 50}


def test_a_plugin_comes_before_torch(monkeypatch: pytest.MonkeyPatch, sgd: torch.optim.Optimizer) -> None:
    _install(monkeypatch, "StepLR", lambda optimizer, **params: ("mine", optimizer, params))
    assert build_schedule("StepLR", {"anything": 1}, sgd) == ("mine", sgd, {"anything": 1})


@pytest.mark.parametrize(
    ("name", "hint"), [("warmupLR", "WarmupLR"), ("StepLr", "StepLR"), ("WarmupCosine", "WarmupCosineLR")]
)
def test_an_unknown_type_names_the_nearest(name: str, hint: str, sgd: torch.optim.Optimizer) -> None:
    with pytest.raises(
        ConfigError, match=rf"(?s)no schedule is called '{name}'.*scheduler\.type.*did you mean '{hint}'"
    ):
        build_schedule(name, {}, sgd)


@pytest.mark.parametrize("name", ["ChainedScheduler", "LRScheduler", "_LRScheduler", "Optimizer"])
def test_what_is_no_schedule_in_a_file(name: str, sgd: torch.optim.Optimizer) -> None:
    with pytest.raises(ConfigError, match=f"no schedule is called '{name}'"):
        build_schedule(name, {}, sgd)


@pytest.mark.parametrize("name", ["OneCycle", "LRRangeTest"])
def test_schedules_of_a_later_release(name: str, sgd: torch.optim.Optimizer) -> None:
    with pytest.raises(NotBuiltError, match=rf"(?s){name} is not built yet.*ds-core"):
        build_schedule(name, {}, sgd)


def test_every_unknown_and_missing_key_is_named(sgd: torch.optim.Optimizer) -> None:
    with pytest.raises(ConfigError) as caught:
        build_schedule("WarmupDecayLR", {"warmup_steps": 4, "zzz": 1}, sgd)
    assert caught.value.what == (
        "WarmupDecayLR does not have 'warmup_steps' (did you mean 'warmup_num_steps'?), does not have 'zzz', "
        "needs 'total_num_steps'"
    )
    assert caught.value.where == (
        "scheduler.params.warmup_steps, scheduler.params.zzz, scheduler.params.total_num_steps"
    )
    assert caught.value.fix is not None
    assert "total_num_steps, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type" in caught.value.fix


def test_an_unknown_key_of_torchs(sgd: torch.optim.Optimizer) -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)'stepsize' \(did you mean 'step_size'\?\).*scheduler\.params\.stepsize"
    ):
        build_schedule("StepLR", {"stepsize": 1}, sgd)


def test_a_refused_value_is_named_by_its_key(sgd: torch.optim.Optimizer) -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)WarmupLR: warmup_num_steps is 4\.0.*scheduler\.params\.warmup_num_steps"
    ):
        build_schedule("WarmupLR", {"warmup_num_steps": 4.0}, sgd)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("CyclicLR", {"base_lr": [1, 2, 3], "max_lr": 1}, "same length"),  # torch raises ValueError
        ("LambdaLR", {"lr_lambda": "x"}, "not callable"),  # torch raises TypeError
    ],
)
def test_errors_of_torchs_schedules(
    name: str, params: dict[str, Any], message: str, sgd: torch.optim.Optimizer
) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){name}: .*{message}.*scheduler\.params"):
        build_schedule(name, params, sgd)


def test_importing_the_package_loads_no_torch() -> None:
    code = (
        "import sys, ds_core.schedules as s; assert not hasattr(s, 'WarmupLROops');"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'torch'];"
        "s.WarmupLR; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
