"""Which parameters an engine trains, in which groups: read from what ``initialize`` was given, and checked."""

from __future__ import annotations

import functools
import hashlib
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_core import comm
from ds_core.errors import CommError, ConfigError
from ds_core.optim.build import check_steps_without_closure
from ds_core.optim.elementwise import is_elementwise

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.distributed import ProcessGroup

    from ds_core.config import Config

__all__ = ["check_ranks_agree", "check_strangers", "groups_to_train"]


def groups_to_train(module: nn.Module, optimizer: Any, model_parameters: Iterable[Any] | None) -> list[dict[str, Any]]:
    """Return the groups to train, each with at least one parameter that requires grad, none twice.

    Args:
        module: trained as a whole where nothing else is said.
        optimizer: of the client, where it has one: its groups count.
        model_parameters: parameters or groups; None: all of ``module``.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        check_steps_without_closure(optimizer)
        given: list[Any] = optimizer.param_groups
    else:
        given = list(module.parameters() if model_parameters is None else model_parameters)
    as_groups = [dict(group) for group in given if isinstance(group, dict)]
    if as_groups and len(as_groups) != len(given):
        raise ConfigError(
            "model_parameters mixes parameters and groups",
            where="initialize(model_parameters)",
            fix="pass either parameters, or dictionaries with a key 'params'",
        )
    groups = as_groups or [{"params": given}]
    seen: set[nn.Parameter] = set()
    for group in groups:
        params = group.get("params", [])
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        wrong = [type(param).__name__ for param in params if not isinstance(param, nn.Parameter)]
        if wrong and given is getattr(optimizer, "param_groups", None):
            raise ConfigError(
                f"the optimizer updates a {wrong[0]}, expected parameters of the model",
                where="initialize(optimizer)",
                fix="build a new one from model.parameters(); one that an engine has used updates its masters",
            )
        if wrong:
            raise ConfigError(
                f"model_parameters holds a {wrong[0]}, expected parameters of the model",
                where="initialize(model_parameters)",
                fix="pass model.parameters()",
            )
        if any(param in seen for param in params) or len(set(params)) != len(params):
            raise ConfigError(
                "a parameter is in the parameter groups twice",
                where="initialize(model_parameters)",
                fix="put each parameter into one group",
            )
        seen.update(params)
        group["params"] = [param for param in params if param.requires_grad]
    return [group for group in groups if group["params"]]


def check_strangers(groups: Sequence[Mapping[str, Any]], module: nn.Module) -> None:
    """Check that what ``groups`` train is of ``module``: what it does not compute with gets no gradient.

    Raises:
        ConfigError: some are not.
    """
    own = set(module.parameters())
    strangers = sum(param not in own for group in groups for param in group["params"])
    if strangers:
        raise ConfigError(
            f"{strangers} parameters to train are not parameters of the model",
            where="initialize(optimizer or model_parameters)",
            fix="build the optimizer from the parameters of the model that is passed",
        )


_AGREED_KEYS = (
    *("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "communication_data_type"),
    *("prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op"),
)
_AGREED_SECTIONS = (
    *("zero_optimization", "partition", "precision", "fp16", "bf16", "torch_autocast", "data_types"),
    *("optimizer", "scheduler"),
)
"""Keys and sections that decide what collectives do, or how weights change."""


def check_ranks_agree(
    module: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[nn.Parameter, str],
    config: Config,
    group: ProcessGroup,
    *,
    optimizer: Any = None,
) -> None:
    """Compare what every later collective relies on, so that a difference is named here and does not hang there.

    Args:
        module: the model.
        groups: those that are trained.
        names: of all parameters.
        config: the configuration.
        group: the ranks that are compared; all of them call this.
        optimizer: what will update, as for :func:`is_elementwise`, where it is new.

    Raises:
        CommError: on every rank, with the first difference.
    """
    facts = [f"{name} {list(t.shape)} {t.dtype}" for name, t in (*module.named_parameters(), *module.named_buffers())]
    for index, each in enumerate(groups):
        facts += [f"parameter {names[param]!r} in group {index}" for param in each["params"]]
        options = {key: value for key, value in sorted(each.items()) if isinstance(value, (bool, int, float))}
        facts.append(f"group {index} with {options}")
    facts += _facts_of(config)
    if optimizer is not None:
        facts.append(_fact_of_optimizer(optimizer))
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    differing = comm.same_on_all_ranks(digest, group)
    if differing:
        of_ranks, rank = comm.values_of_ranks(facts, group), min(differing)
        pairs = itertools.zip_longest(of_ranks[0], of_ranks[rank], fillvalue="nothing more")
        first, other = next((first, other) for first, other in pairs if first != other)
        raise CommError(
            f"model, parameter groups or configuration differ between ranks: {sorted(differing)} differ from rank 0",
            where=f"initialize: rank 0 has {first}, rank {rank} has {other}",
            fix="pass the same configuration, optimizer and parameters (order, shapes, requires_grad) on every rank, "
            "with the same packages installed",
        )


def _facts_of(config: Config) -> list[str]:
    facts = [f"{key} {getattr(config, key)}" for key in _AGREED_KEYS]
    for name in _AGREED_SECTIONS:
        section = getattr(config, name)
        if section is None:
            facts.append(f"no section {name!r}")
        else:
            facts += [f"{name}.{key} {value!r}" for key, value in section.model_dump().items()]
    # By name, not by section: it also depends on what is installed where a rank runs.
    return [*facts, f"checkpoint engine {config.plugin('checkpoint')}"]


def _fact_of_optimizer(optimizer: Any) -> str:
    kind = "element-wise" if is_elementwise(optimizer) else "of whole tensors"  # which decides who owns what
    while isinstance(optimizer, functools.partial):
        optimizer = optimizer.func
    made_by = type(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    return f"the optimizer {getattr(made_by, '__qualname__', type(made_by).__qualname__)}, {kind}"
