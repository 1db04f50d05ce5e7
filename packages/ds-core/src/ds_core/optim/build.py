"""``optimizer.type`` and ``optimizer.params`` -> an optimizer: a plugin's by name, else torch's own."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from ds_core import registry
from ds_core._packages import PACKAGE_OF_PLUGIN
from ds_core.errors import ConfigError, NotBuiltError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ds_core.interfaces.optimizer import OptimizerFactory

__all__ = ["build_optimizer", "check_steps_without_closure", "find_optimizer"]

_LATER = ("muadam", "muadamw", "musgd")
"""Optimizers of DeepSpeed's, from the package mup. Without this list the hint would be Adam, which is another one."""


def find_optimizer(type_name: str) -> OptimizerFactory:
    """Return what builds ``optimizer.type``: a plugin of that name in lower case, else ``torch.optim``'s, in any case.

    Raises:
        MissingPackageError: a known package brings it.
        NotBuiltError: DeepSpeed has it, and no package brings it yet.
        PluginError: nobody does; names the nearest.
    """
    name = type_name.lower()
    of_torch = _torch_optimizers()
    if name in of_torch and name not in registry.names("optimizer") and ("optimizer", name) not in PACKAGE_OF_PLUGIN:
        factory: OptimizerFactory = of_torch[name]
        return factory
    if name in _LATER and name not in registry.names("optimizer"):
        raise NotBuiltError(
            f"optimizer {type_name} is not built yet: it comes with a later release of ds-core",
            where="optimizer.type",
            fix="take another optimizer, or pass your own to initialize",
        )
    found: OptimizerFactory = registry.find(
        "optimizer", name, needed_by=f"optimizer.type {type_name}", others=tuple(of_torch)
    ).load()
    return found


def _torch_optimizers() -> dict[str, Any]:
    """Return torch's own optimizers by their name in lower case."""
    return {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }


def build_optimizer(
    type_name: str, params: Mapping[str, Any], param_groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """Build the optimizer of the configuration over ``param_groups``.

    torch's one-kernel (``fused``) update is used where the class has one that works and ``params`` does not choose.

    Raises:
        ConfigError: a parameter the optimizer does not know or cannot use.
        PluginError: see :func:`find_optimizer`.
    """
    factory = find_optimizer(type_name)
    where = "optimizer.params"
    options = dict(params)
    known = inspect.signature(factory).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    unknown = [] if takes_any else [key for key in options if key not in known]
    if unknown:
        allowed = [name for name in list(known)[1:] if not name.startswith("_")]
        raise ConfigError(
            f"optimizer {type_name!r} has no parameter {', '.join(map(repr, unknown))}",
            where=f"{where}.{unknown[0]}",
            fix=f"one of {', '.join(allowed)}",
        )
    if "fused" in known and not {"fused", "foreach", "differentiable"} & set(options):
        does_nothing = _is_sgd(factory) and _has_16_bit_on_cpu(param_groups)
        options["fused"] = not (does_nothing or _has_complex(param_groups))
    try:
        optimizer = factory(param_groups, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optimizer {type_name!r} refuses its parameters: {error}",
            where=where,
            fix="see the optimizer's own documentation",
        ) from error
    check_steps_without_closure(optimizer)
    return optimizer


def _is_sgd(factory: Any) -> bool:
    return isinstance(factory, type) and issubclass(factory, torch.optim.SGD)


def _has_16_bit_on_cpu(param_groups: list[dict[str, Any]]) -> bool:
    """Return whether torch's fused SGD would leave parameters as they are, without a word.

    Its CPU kernel does not write whole vectors of fp16 and bf16 in torch 2.12 and 2.13
    (https://github.com/pytorch/pytorch/issues/191763).
    """
    return any(
        param.device.type == "cpu" and param.dtype in (torch.float16, torch.bfloat16)
        for group in param_groups
        for param in group["params"]
    )


def _has_complex(param_groups: list[dict[str, Any]]) -> bool:
    """Return whether torch's fused kernels would refuse one of the parameters."""
    return any(param.is_complex() for group in param_groups for param in group["params"])


def check_steps_without_closure(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that an engine cannot drive by ``step()`` alone (P21): it owns forward and backward.

    Raises:
        ConfigError: naming the class: its step needs a closure or other arguments, or sparse gradients.
    """
    name, fix = type(optimizer).__name__, "use an optimizer whose step() takes no closure, such as AdamW"
    needed = [
        parameter.name
        for parameter in list(inspect.signature(type(optimizer).step).parameters.values())[1:]
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    if "closure" in needed:
        what = f"{name} needs a closure that recomputes the loss, which an engine cannot give it"
    elif needed:
        what = f"the step of {name} needs {', '.join(needed)}, which an engine cannot give it"
    elif isinstance(optimizer, torch.optim.SparseAdam):
        what = f"{name} takes only sparse gradients, and gradients are reduced as dense ones"
        fix = "use Adam, and torch.nn.Embedding(..., sparse=False)"
    else:
        return
    raise ConfigError(what, where="optimizer", fix=fix)
