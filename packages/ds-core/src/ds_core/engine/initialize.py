"""``initialize``: from a model and a configuration to an engine, in DeepSpeed's signature."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ds_core import comm, log, registry
from ds_core.config import load_config
from ds_core.errors import ConfigError, NotBuiltError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable

    from torch import nn
    from torch.optim import Optimizer

    from ds_core.config import Config
    from ds_core.interfaces.engine import EngineProvider

__all__ = ["add_config_arguments", "initialize"]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | Callable[..., Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
    *,
    compatible: bool | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Wrap ``model`` in an engine that trains it as ``config`` says. Every rank calls it, with equal arguments.

    Args:
        args: an object whose ``deepspeed_config`` (a path or dict) is used where ``config`` is not given, and whose
            ``device_rank`` chooses the device instead of the local rank.
        model: what to train; moved to this rank's device, its values replaced by rank 0's.
        optimizer: a torch optimizer over parameters of the model, or a callable that makes one from parameter groups;
            instead of the configuration's.
        model_parameters: parameters or groups to train; None: all that require grad.
        training_data: a dataset; a loader of this rank's micro-batches is returned for it.
        lr_scheduler: a schedule of ``optimizer``, or a callable that makes one from the optimizer; instead of the
            configuration's.
        distributed_port: MASTER_PORT where the environment has none.
        mpu, mesh_param: model and sequence parallelism, not built yet.
        dist_init_required: False: the process group must exist already.
        collate_fn: for the loader of ``training_data``.
        config: a dict, the path of a JSON or HJSON file, or urlsafe base64 of its text.
        config_params: the same, used where ``config`` is None.
        compatible: drop keys of the configuration that DeepSpeed ignores, such as a client's own, with one warning
            each; None: where the environment has ``DS_CONFIG_COMPATIBLE=1``.

    Returns:
        (engine, optimizer, loader of ``training_data`` or None, learning-rate schedule or None).

    Raises:
        ConfigError: what is asked for cannot be; everything wrong with the configuration is told at once.
        MissingPackageError: a package that it needs is not installed.
        CommError: the ranks do not agree.

    >>> import torch, ds_core
    >>> engine, optimizer, _, _ = ds_core.initialize(
    ...     model=torch.nn.Linear(2, 1),
    ...     config={"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}},
    ... )
    >>> loss = engine(torch.ones(4, 2)).pow(2).mean()
    >>> _ = engine.backward(loss)
    >>> engine.step()
    >>> engine.global_steps
    1
    """
    _check_model(model)
    if mpu is not None:
        raise NotBuiltError(
            "mpu= (model parallelism by a Megatron-style object) is not built yet",
            where="initialize(mpu)",
            fix="leave it out: all ranks are data-parallel",
        )
    if mesh_param is not None:
        raise NotBuiltError(
            "mesh_param= (sequence parallelism) is not built yet",
            where="initialize(mesh_param)",
            fix="leave it out: all ranks are data-parallel",
        )
    log.configure(None)  # loading may have warnings
    source = _config_source(args, config, config_params)
    loaded = load_config(source, dp_world_size=comm.expected_world_size(), compatible=compatible)
    log.configure(loaded.log_level)
    provider = _provider(model, loaded)
    engine = provider.build(
        model=model,
        config=loaded,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        collate_fn=collate_fn,
        device_index=getattr(args, "device_rank", None),
        distributed_port=distributed_port,
        dist_init_required=dist_init_required,
    )
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _check_model(model: Any) -> None:
    from torch import nn

    if not isinstance(model, nn.Module):
        what = "no model was given" if model is None else f"model is a {type(model).__name__}, not a torch.nn.Module"
        raise ConfigError(what, where="initialize(model)", fix="pass model=, a torch.nn.Module")


def _config_source(args: Any, config: Any, config_params: Any) -> Any:
    in_args, old = getattr(args, "deepspeed_config", None), getattr(args, "deepscale_config", None)
    if old is not None:
        if in_args is not None:
            raise ConfigError(
                "two configurations were given: args.deepspeed_config and args.deepscale_config",
                where="initialize(args)",
                fix="remove deepscale_config, the old spelling",
            )
        log.log_dist("args.deepscale_config is deprecated: write deepspeed_config", level=logging.WARNING)
        in_args = old
    given = config if config is not None else config_params
    if in_args is not None and given is not None:
        raise ConfigError(
            "two configurations were given: config= and args.deepspeed_config",
            where="initialize",
            fix="pass one of them",
        )
    if in_args is None and given is None:
        raise ConfigError(
            "no configuration was given",
            where="initialize",
            fix="pass config=, a dict or the path of a JSON file, or start with --deepspeed_config FILE",
        )
    return in_args if given is None else given


def _provider(model: Any, config: Config) -> EngineProvider:
    claimed: dict[str, EngineProvider] = {}
    for name in registry.names("engine"):
        if name != "plain":
            provider: EngineProvider = registry.load("engine", name)()
            if provider.matches(model, config):
                claimed[name] = provider
    if len(claimed) > 1:
        raise ConfigError(
            f"several engines claim this model: {', '.join(claimed)}",
            where="initialize",
            fix="uninstall all but one, or change the configuration so that one matches",
        )
    if claimed:
        return next(iter(claimed.values()))
    plain: EngineProvider = registry.load("engine", "plain")()
    return plain


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add DeepSpeed's arguments to ``parser``: ``--deepspeed``, ``--deepspeed_config FILE`` and their old spellings."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configurations")
    group.add_argument("--deepspeed", action="store_true", help="train with the ds runtime")
    group.add_argument("--deepspeed_config", type=str, default=None, help="path of the configuration (JSON)")
    group.add_argument("--deepscale", action="store_true", help="old spelling of --deepspeed")
    group.add_argument("--deepscale_config", type=str, default=None, help="old spelling of --deepspeed_config")
    return parser
