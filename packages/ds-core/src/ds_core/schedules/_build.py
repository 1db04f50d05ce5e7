"""``scheduler.type`` and ``scheduler.params`` -> a schedule, with every mistake named by its config key."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

from ds_core import registry
from ds_core.errors import ConfigError, DsError, NotBuiltError, PluginError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch.optim import Optimizer

    from ds_core.interfaces.scheduler import LRSchedule

__all__ = ["build_schedule"]

_LATER = ("LRRangeTest", "OneCycle")
"""Schedules of DeepSpeed's that a later ds-core brings. Without this list the hint would be torch's OneCycleLR."""


def build_schedule(type_name: str, params: Mapping[str, Any] | None, optimizer: Optimizer) -> LRSchedule:
    """Return the schedule that a config's ``scheduler`` section describes.

    Args:
        type_name: ``scheduler.type``: the name of a ``scheduler`` plugin, else of a class in
            ``torch.optim.lr_scheduler``. Upper and lower case count.
        params: ``scheduler.params``, passed on as keyword arguments.
        optimizer: the inner torch optimizer.

    Raises:
        ConfigError: no such type, a key its constructor does not have, one it needs, or a value it refuses.
        NotBuiltError: a schedule of DeepSpeed's that comes with a later release.

    >>> import torch
    >>> sgd = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    >>> build_schedule("StepLR", {"step_size": 30}, sgd).get_last_lr()
    [0.1]
    """
    given = dict(params or {})
    factory = _factory(type_name)
    _check_keys(type_name, factory, given)
    try:
        return cast("LRSchedule", factory(optimizer, **given))
    except (TypeError, ValueError) as error:
        raise _as_config_error(type_name, error) from error


def _factory(type_name: str) -> Callable[..., Any]:
    plugins, torchs = registry.names("scheduler"), _torch_schedules()
    if type_name in plugins:
        return cast("Callable[..., Any]", registry.load("scheduler", type_name, needed_by="scheduler.type"))
    if type_name in torchs:
        return torchs[type_name]
    if type_name in _LATER:
        raise NotBuiltError(
            f"{type_name} is not built yet: it comes with a later release of ds-core",
            where="scheduler.type",
            fix="pip install --upgrade ds-core",
        )
    try:
        registry.find("scheduler", type_name, needed_by="scheduler.type", others=tuple(torchs))
    except PluginError as error:
        raise ConfigError(
            f"no schedule is called {type_name!r}",
            where=f"scheduler.type; here are {', '.join(plugins)}; from torch {', '.join(sorted(torchs))}",
            fix=error.fix,
        ) from error
    raise AssertionError("a plugin that is found is among the names")


def _torch_schedules() -> dict[str, Callable[..., Any]]:
    """Return torch's schedules that can be built from an optimizer and values of a JSON file."""
    from torch.optim import lr_scheduler

    return {
        name: schedule
        for name, schedule in vars(lr_scheduler).items()
        if isinstance(schedule, type)
        and issubclass(schedule, lr_scheduler.LRScheduler)
        and not name.startswith("_")
        and schedule is not lr_scheduler.LRScheduler
        # ChainedScheduler takes schedules first, and makes no sense in a file.
        and next(iter(inspect.signature(schedule).parameters)) == "optimizer"
    }


def _check_keys(type_name: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> None:
    parameters = list(inspect.signature(factory).parameters.values())[1:]  # without the optimizer
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
    valid = [parameter.name for parameter in named]
    missing = [parameter.name for parameter in named if parameter.default is parameter.empty]
    unknown = [key for key in given if key not in valid]
    missing = [key for key in missing if key not in given]
    if unknown or missing:
        problems = [f"does not have {key!r}{_hint(key, valid)}" for key in unknown]
        problems += [f"needs {key!r}" for key in missing]
        raise ConfigError(
            f"{type_name} " + ", ".join(problems),
            where=", ".join(f"scheduler.params.{key}" for key in (*unknown, *missing)),
            fix=f"the parameters of {type_name} are {', '.join(valid)}",
        )


def _hint(key: str, valid: Iterable[str]) -> str:
    close = nearest(key, valid)
    return f" (did you mean {close!r}?)" if close else ""


def _as_config_error(type_name: str, error: TypeError | ValueError) -> ConfigError:
    where = "scheduler.params"
    if not isinstance(error, DsError):
        return ConfigError(f"{type_name}: {error}", where=where)
    # Our own say "WarmupLR.warmup_num_steps", which is right where the class is called by hand.
    key = (error.where or "").partition(".")[2]
    return ConfigError(f"{type_name}: {error.what}", where=f"{where}.{key}" if key else where, fix=error.fix)
