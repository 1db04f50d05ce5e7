"""Helpers for ``torch.autocast``: which modules are safe in lower precision, and what their parameters travel in.

Nothing here is global: what an engine does is asked of the engine, what a parameter travels in is on the parameter.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch
from torch import nn

from ds_core.engine.forward import plan_autocast
from ds_core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from ds_core.engine.engine import DeepSpeedEngine

__all__ = [
    "LOWER_PRECISION_SAFE_MODULES",
    "PARAM_COMM_DTYPE_ATTR_NAME",
    "autocast_if_enabled",
    "get_all_comm_dtypes",
    "get_autocast_dtype",
    "get_comm_dtype",
    "get_default_autocast_lower_precision_modules",
    "has_comm_dtype",
    "init_autocast_params",
    "is_autocast_initialized",
    "safe_module_classes",
    "sort_dtypes",
]

LOWER_PRECISION_SAFE_MODULES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The classes whose parameters are communicated in the lower precision, unless the configuration names others."""
PARAM_COMM_DTYPE_ATTR_NAME = "comm_dtype"
"""The attribute of a parameter that says what it, and its gradient, travel in."""

KEY = "torch_autocast.lower_precision_safe_modules"


def get_default_autocast_lower_precision_modules() -> list[str]:
    """Return the dotted names of :data:`LOWER_PRECISION_SAFE_MODULES`.

    >>> get_default_autocast_lower_precision_modules()[0]
    'torch.nn.modules.linear.Linear'
    """
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in LOWER_PRECISION_SAFE_MODULES]


def safe_module_classes(names: Iterable[str]) -> tuple[type[nn.Module], ...]:
    """Return the classes called ``names``, in their order, each once.

    Args:
        names: dotted names, such as ``torch.nn.Linear`` or ``my_models.layers.Outer.Inner``. The modules in them are
            imported.

    Raises:
        ConfigError: a name does not lead to a subclass of ``torch.nn.Module``; names every one that does not.

    >>> safe_module_classes(["torch.nn.Linear", "torch.nn.modules.linear.Linear"])
    (<class 'torch.nn.modules.linear.Linear'>,)
    """
    if isinstance(names, str):
        raise ConfigError(f"{names!r} is one name, expected is a list of them", where=KEY, fix=f"write [{names!r}]")
    found: dict[type[nn.Module], None] = {}
    problems: list[ConfigError] = []
    for name in names:
        try:
            found[_module_class(name)] = None
        except ConfigError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = [f"{len(problems)} names cannot be used"]
        for problem in problems:
            lines += [f"  {problem.what}", f"    fix: {problem.fix}"]
        raise ConfigError("\n".join(lines), where=KEY)
    return tuple(found)


def _module_class(name: object) -> type[nn.Module]:
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")) or "." not in name:
        raise _bad(name, "it is not a dotted name", "write module and class, such as torch.nn.Linear")
    found = _resolve(name)
    if not isinstance(found, type):
        raise _bad(name, f"it is a {type(found).__name__}, not a class", "name a class, such as torch.nn.Linear")
    if not issubclass(found, nn.Module):
        raise _bad(name, "it is not a subclass of torch.nn.Module", "name the class of a layer, or remove it")
    return found


def _resolve(name: str) -> object:
    """Return what the dotted ``name`` leads to: attributes where there are, else modules, which are imported."""
    path, *rest = name.split(".")
    found: object = _import(path, name)
    if found is None:
        raise _bad(name, f"no module is called {path!r}", "check the spelling, or make the module importable")
    for part in rest:
        inner = getattr(found, part, None)
        if inner is None and hasattr(found, "__path__"):
            inner = _import(f"{path}.{part}", name)
        if inner is None:
            close = nearest(part, dir(found))
            fix = f"did you mean {path}.{close}?" if close else f"name a class that {path} has"
            raise _bad(name, f"{path} has no {part!r}", fix)
        found, path = inner, f"{path}.{part}"
    return found


def _import(path: str, name: str) -> object | None:
    """Return the module ``path``, None if there is none; one that is there and cannot be imported is an error."""
    try:
        return importlib.import_module(path)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == path:
            return None
        raise _bad(name, f"{path} cannot be imported: {error}", f"make 'import {path}' work") from error


def _bad(name: object, why: str, fix: str) -> ConfigError:
    return ConfigError(f"{name!r} is no module class: {why}", where=KEY, fix=fix)


def init_autocast_params(
    engine: DeepSpeedEngine, dtype: torch.dtype, module_names: Iterable[str] | None = None
) -> None:
    """Mark the direct parameters of modules of exactly the named classes: their attribute ``comm_dtype`` is ``dtype``.

    Marks of an earlier call are taken off. Nothing else changes: the engine's own collectives follow its precision's
    plan (``PrecisionPlan.reduce_in``), which comes from the same names in the configuration.

    Args:
        engine: whose module's parameters are marked.
        dtype: floating point.
        module_names: dotted names; None: :func:`get_default_autocast_lower_precision_modules`.

    Raises:
        ConfigError: ``dtype`` is not a floating-point dtype, or a name leads to no module class.
    """
    # DeepSpeed took None here, and parameters were marked to travel in "None".
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(
            f"dtype is {dtype!r}, expected is a floating-point torch.dtype",
            where="init_autocast_params",
            fix="pass torch.bfloat16 or torch.float16",
        )
    classes = LOWER_PRECISION_SAFE_MODULES if module_names is None else safe_module_classes(module_names)
    for param in engine.module.parameters():
        if has_comm_dtype(param):
            delattr(param, PARAM_COMM_DTYPE_ATTR_NAME)
    for module in engine.module.modules():
        if type(module) in classes:
            for param in module.parameters(recurse=False):
                setattr(param, PARAM_COMM_DTYPE_ATTR_NAME, dtype)


def has_comm_dtype(param: torch.Tensor) -> bool:
    """Return whether ``param`` was marked by :func:`init_autocast_params`."""
    return hasattr(param, PARAM_COMM_DTYPE_ATTR_NAME)


def get_comm_dtype(param: torch.Tensor) -> torch.dtype:
    """Return the dtype ``param`` is marked to travel in; without a mark its own."""
    dtype: torch.dtype = getattr(param, PARAM_COMM_DTYPE_ATTR_NAME, param.dtype)
    return dtype


def get_all_comm_dtypes(params: Iterable[torch.Tensor]) -> set[torch.dtype]:
    """Return what :func:`get_comm_dtype` says for ``params``, each dtype once."""
    return {get_comm_dtype(param) for param in params}


def sort_dtypes(dtypes: Iterable[torch.dtype]) -> list[torch.dtype]:
    """Return ``dtypes`` in the order of their names, which is the same on every rank.

    >>> sort_dtypes({torch.float32, torch.bfloat16})
    [torch.bfloat16, torch.float32]
    """
    return sorted(dtypes, key=str)


def is_autocast_initialized(engine: DeepSpeedEngine) -> bool:
    """Return whether this engine's forward runs under ``torch.autocast``; other engines do not matter."""
    return get_autocast_dtype(engine) is not None


def get_autocast_dtype(engine: DeepSpeedEngine) -> torch.dtype | None:
    """Return the dtype this engine's forward is autocast to, None without autocast."""
    return engine.parts.precision.plan.autocast


def autocast_if_enabled(engine: DeepSpeedEngine) -> AbstractContextManager[object]:
    """Return a context in which code computes as in this engine's forward.

    The engine's word holds, also inside an autocast of the caller's: its device and dtype if it has one, else none.
    """
    return plan_autocast(get_autocast_dtype(engine), engine.device.type)
