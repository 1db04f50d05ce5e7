"""The private engine under an optimizer that was made by hand: what its constructor's arguments become."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import ds_core
from ds_core.errors import ConfigError, NotBuiltError
from ds_fp16.loss_scaler import LossScaleConfig, LossScaleProfile

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["build", "only_the_config", "precision_section", "refuse", "scaling_of"]


def build(
    optimizer: torch.optim.Optimizer, config: Mapping[str, Any], *, where: str, names: Mapping[Any, str] | None = None
) -> Any:
    """Return an engine over the parameters of ``optimizer``, which it takes over.

    Args:
        optimizer: its groups get masters as parameters.
        config: sections of the engine's configuration.
        where: the class, for errors.
        names: of the parameters, for errors and overflow records; else they have numbers.

    Raises:
        ConfigError: not a torch optimizer, or a parameter has no name in ``names``.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"init_optimizer is a {type(optimizer).__name__}",
            where=where,
            fix="pass a torch optimizer, such as torch.optim.AdamW(model.parameters())",
        )
    params = [param for group in optimizer.param_groups for param in group["params"]]
    strange = next((type(param).__name__ for param in params if not isinstance(param, nn.Parameter)), None)
    if strange is not None:
        raise ConfigError(
            f"init_optimizer updates a {strange}, expected parameters of a model",
            where=where,
            fix="build it from model.parameters()",
        )
    model = nn.ParameterList(params) if names is None else _module_with(params, names, where)
    engine, *_ = ds_core.initialize(
        model=model, optimizer=optimizer, config={"train_micro_batch_size_per_gpu": 1, **config}
    )
    return engine


def _module_with(params: list[nn.Parameter], names: Mapping[Any, str], where: str) -> nn.Module:
    """Return a module, of modules, whose parameters are ``params`` under their ``names``."""
    root = nn.Module()
    for param in params:
        if param not in names:
            raise ConfigError(
                f"param_names has no name for a parameter of shape {list(param.shape)}",
                where=where,
                fix="pass {param: name for name, param in model.named_parameters()}",
            )
        *path, last = names[param].split(".")
        inner = root
        for part in path:
            if not hasattr(inner, part):
                inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        inner.register_parameter(last, param)
    return root


def refuse(where: str, **arguments: tuple[Any, str]) -> None:
    """Raise for the first of ``arguments``, name -> (value, fix), that was given: none of them is built."""
    for name, (value, fix) in arguments.items():
        if value is not None and value is not False:
            raise NotBuiltError(f"{name}= is not built", where=f"{where}({name})", fix=fix)


def precision_section(dtype: torch.dtype, where: str) -> str:
    """Return the section of the configuration that stores parameters in ``dtype``."""
    section = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype)
    if section is None:
        raise ConfigError(f"low_precision_dtype is {dtype}", where=where, fix="pass torch.float16 or torch.bfloat16")
    return section


def scaling_of(
    where: str,
    dtype: torch.dtype,
    static: float,
    is_dynamic: bool,
    arguments: Mapping[str, Any] | None,
    profile: LossScaleProfile,
    first: float | None = None,
) -> LossScaleConfig:
    """Return the loss scaling that the constructor's arguments ask for.

    Raises:
        ConfigError: naming an argument that another one makes meaningless.
    """
    without_effect = None
    if precision_section(dtype, where) != "fp16":
        without_effect = _first(
            {"static_loss_scale": static != 1.0, "dynamic_loss_scale": is_dynamic}, "only fp16 is scaled"
        )
    elif is_dynamic:
        # DeepSpeed's own engine passes 0 here when the scale is found while training.
        without_effect = _first({"static_loss_scale": static not in (0.0, 1.0)}, "the scale is found while training")
        if first is not None and "init_scale" in (arguments or {}):
            without_effect = "initial_dynamic_scale", "dynamic_loss_args has an init_scale"
    if without_effect is None and not is_dynamic:
        unused = {"initial_dynamic_scale": first is not None, "dynamic_loss_args": arguments is not None}
        without_effect = _first(unused, "dynamic_loss_scale is False")
    if without_effect is not None:
        name, why = without_effect
        raise ConfigError(f"{name}= would change nothing: {why}", where=f"{where}({name})", fix="leave it out")
    return LossScaleConfig(dtype, is_dynamic, static, arguments, profile=profile, initial_dynamic_scale=first)


def only_the_config(where: str, **given: bool) -> None:
    """Raise for the first of ``given`` that is True: ``loss_scale_config`` says all of it already."""
    found = _first(given, "")
    if found is not None:
        raise ConfigError(
            f"{found[0]}= and loss_scale_config= were given, and both say how the loss is scaled",
            where=f"{where}({found[0]})",
            fix="pass one of them",
        )


def _first(given: Mapping[str, bool], why: str) -> tuple[str, str] | None:
    return next(((name, why) for name, is_given in given.items() if is_given), None)
