"""Chooses and builds the parts of an engine: the only module that knows how configuration becomes parts.

What a mistake in the configuration can break is checked by :func:`choose` before a process group or device is touched.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_core import comm, registry
from ds_core.accelerator import get_accelerator
from ds_core.config.sections.choices import SHARDED
from ds_core.engine.adding import accept_groups
from ds_core.engine.engine import DeepSpeedEngine
from ds_core.engine.forward import build_forward
from ds_core.engine.fragments import find_by_params
from ds_core.engine.groups import check_ranks_agree, check_strangers, groups_to_train
from ds_core.engine.observers import MonitorObserver, ProgressLine
from ds_core.engine.parts import Accumulation, Clip, Parts, ScheduleStep
from ds_core.errors import ConfigError, EngineError
from ds_core.interfaces.engine import EngineProvider
from ds_core.interfaces.logical import logical_name
from ds_core.interfaces.partition import Partition, PartitionInputs
from ds_core.log import log_dist
from ds_core.optim.build import build_optimizer, check_steps_without_closure, find_optimizer
from ds_core.optim.client import check_updates, take_over
from ds_core.optim.elementwise import is_elementwise, known_of
from ds_core.optim.scaled import OptimizerStep
from ds_core.schedules import build_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ds_core.config import Config, Section
    from ds_core.interfaces.activation import ActivationCheckpointing
    from ds_core.interfaces.checkpoint import CheckpointEngine
    from ds_core.interfaces.monitor import Monitor
    from ds_core.interfaces.precision import Precision
    from ds_core.interfaces.scheduler import LRSchedule

__all__ = ["Arguments", "Choice", "PlainEngineProvider", "build_engine", "choose"]


@dataclass(frozen=True)
class Arguments:
    """The arguments of ``initialize`` that reach an engine."""

    model: nn.Module
    config: Config
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None
    model_parameters: Iterable[Any] | None = None
    training_data: Any = None
    lr_scheduler: Any = None
    collate_fn: Callable[[Any], Any] | None = None
    device_index: int | None = None
    distributed_port: int = 29500
    dist_init_required: bool | None = None


@dataclass(frozen=True)
class Choice:
    """The plugins a configuration asks for."""

    precision: Precision
    partition: type[Partition]
    checkpoint: type[CheckpointEngine]
    activation: type[ActivationCheckpointing] | None
    """None: the section ``activation_checkpointing`` asks for nothing, or nobody here reads it."""
    monitors: Sequence[tuple[type[Monitor], Section]]
    """Each enabled monitor with its section."""


class PlainEngineProvider(EngineProvider):
    """The engine for every model that no other provider claims."""

    def matches(self, model: nn.Module, config: Config) -> bool:
        return True

    def build(self, **arguments: Any) -> DeepSpeedEngine:
        return build_engine(Arguments(**arguments))


def choose(config: Config) -> Choice:
    """Look up every plugin ``config`` names. Touches no device and no process group.

    Raises:
        MissingPackageError: naming the option and the package to install.
        ConfigError: a plugin refuses its options.
    """
    name, needed_by = _precision_name(config)
    precision: Precision = _load(config, "precision", name, needed_by)(config)
    stage = config.zero_optimization.stage
    by = "partition.type" if config.partition.type else f"zero_optimization.stage {stage}"
    if config.optimizer is not None:
        find_optimizer(config.optimizer.type)
    partition: type[Partition] = _load(config, "partition", config.plugin("partition"), by)
    partition.check_config(config)
    return Choice(
        precision,
        partition,
        _checkpoint(config),
        _activation(config),
        _monitors(config),
    )


def _activation(config: Config) -> type[ActivationCheckpointing] | None:
    section, name = config.sections.get("activation_checkpointing"), "deepspeed"
    if section is None or not section.is_on():
        return None
    if getattr(section, "policy", None) is None and name not in registry.names("activation"):
        return None  # the report says of each key that nobody reads it
    found: type[ActivationCheckpointing] = registry.load(
        "activation", name, needed_by="activation_checkpointing.policy"
    )
    found.check_config(config)
    return found


def _checkpoint(config: Config) -> type[CheckpointEngine]:
    name, by = config.plugin("checkpoint"), config.checkpoint.chosen_by
    found: type[CheckpointEngine] = _load(config, "checkpoint", name, by or "checkpoint.engine")
    if config.checkpoint.load_universal and not found.reads_universal:
        # Refused by name where the package is missing, which is how the core came to choose its own.
        registry.find("checkpoint", SHARDED, needed_by="checkpoint.load_universal")
        raise ConfigError(
            f"checkpoint.load_universal is true, and the engine {name!r} does not read DeepSpeed's universal folders",
            where=f"{by}, in {config.where}",
            fix=f'set checkpoint.engine to "{SHARDED}", or leave it out',
        )
    return found


def _load(config: Config, seam: str, name: str, needed_by: str) -> Any:
    """Return the plugin's class, its options checked: also those that it would read only later, or on many ranks."""
    found = registry.load(seam, name, needed_by=needed_by)
    config.options(seam, name, found.Config)
    return found


def _monitors(config: Config) -> list[tuple[type[Monitor], Section]]:
    sections = config.sections
    return [
        (registry.load("monitor", name, needed_by=f"{name}.enabled"), sections[name])
        for name in registry.names("monitor")
        if getattr(sections.get(name), "enabled", False)
    ]


def _precision_name(config: Config) -> tuple[str, str]:
    name = config.plugin("precision")
    if config.precision.type is not None:
        return name, "precision.type"
    return name, "precision" if name == "fp32" else f"{name}.enabled"


def build_engine(arguments: Arguments) -> DeepSpeedEngine:
    """Build the engine. Collective: every rank passes an equal model (its values may differ) and equal arguments.

    Raises:
        ConfigError: the optimizer or schedule cannot be built as asked.
        CommError: the model or its parameter groups differ between ranks.
    """
    config, module = arguments.config, arguments.model
    choice = choose(config)
    groups = groups_to_train(module, arguments.optimizer, arguments.model_parameters)
    check_strangers(groups, module)
    choice.precision.plan.dtypes_of(module)  # here for what it refuses
    device = _device(arguments.device_index)
    _check_dtypes(config, choice)
    trains = bool(groups) and (arguments.optimizer is not None or config.optimizer is not None)
    if not trains and (arguments.lr_scheduler is not None or config.scheduler is not None):
        raise ConfigError(
            "a learning-rate schedule was given, but there is no optimizer it could drive",
            where="initialize(lr_scheduler)" if config.scheduler is None else f"scheduler, in {config.where}",
            fix="configure the section 'optimizer', or pass optimizer= to initialize",
        )
    comm.init_distributed(distributed_port=arguments.distributed_port, dist_init_required=arguments.dist_init_required)
    group = torch.distributed.group.WORLD
    assert group is not None
    module.to(device)
    names = {param: logical_name(name) for name, param in module.named_parameters()}
    check_ranks_agree(module, groups, names, config, group, optimizer=_what_updates(arguments) if trains else None)
    comm.broadcast_tensors([*module.parameters(), *module.buffers()], group)
    partition = choice.partition(
        PartitionInputs(
            module,
            groups if trains else [],
            names,
            choice.precision.plan,
            group,
            device,
            config,
            find_sources=choice.precision.skips_overflow,
            whole_tensors=trains and not is_elementwise(_what_updates(arguments)),
        )
    )
    _warn_of_dtypes(partition)
    _warn_of_vocabulary(config)
    optimizer = schedule = None
    if trains:
        optimizer = _optimizer(arguments, partition)
        _say_if_unknown(optimizer, partition, _what_updates(arguments))
        if config.gradient_clipping > 0 and "gradient_clipping" not in config.raw:
            log_dist(
                f'gradients are clipped at norm {config.gradient_clipping}, the default; "gradient_clipping" sets it'
            )
        schedule = _schedule(arguments, optimizer)
    parts = Parts(
        forward=build_forward(module, choice.precision.plan, device),
        precision=choice.precision,
        partition=partition,
        optimizer=None if optimizer is None else OptimizerStep(optimizer),
        schedule=ScheduleStep(schedule),
        accumulation=Accumulation(config.gradient_accumulation_steps),
        clip=Clip(config.gradient_clipping),
        checkpoint=choice.checkpoint(
            config.options("checkpoint", config.plugin("checkpoint"), choice.checkpoint.Config), group
        ),
        group=group,
        world_size=comm.get_world_size(group),
        observers=_observers(config, choice),
    )
    engine = DeepSpeedEngine(module, parts, config, device=device)
    find_by_params(engine)
    accept_groups(engine)
    engine.client_optimizer, engine.client_lr_scheduler = arguments.optimizer, arguments.lr_scheduler
    if arguments.training_data is not None:
        engine.training_dataloader = engine.deepspeed_io(arguments.training_data, collate_fn=arguments.collate_fn)
    if choice.activation is not None:
        # Last: it changes the caller's model, which an initialize that fails leaves to him.
        engine.parts = replace(parts, activation=choice.activation().attach(module, config, group, device))
    return engine


def _device(index: int | None) -> torch.device:
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return accelerator.device()
    index = comm.get_local_rank() if index is None else index
    if index >= accelerator.device_count():
        raise EngineError(
            f"local rank {index} has no device: this host has {accelerator.device_count()}",
            where=f"accelerator {accelerator.device_name()!r}",
            fix="start at most one rank per device, or set DS_ACCELERATOR=cpu",
        )
    accelerator.set_device(index)
    return accelerator.device(index)


def _check_dtypes(config: Config, choice: Choice) -> None:
    """Refuse a precision that this rank's device cannot compute in. The device is chosen by now, not used."""
    accelerator = get_accelerator()
    plan = choice.precision.plan
    wanted = {dtype for dtype in (plan.stored, plan.autocast) if dtype not in (None, torch.float32)}
    # Asking a GPU for its dtypes wakes it up, which fp32 need not.
    missing = wanted - set(accelerator.supported_dtypes()) if wanted else set()
    if missing:
        able = ", ".join(str(dtype).removeprefix("torch.") for dtype in accelerator.supported_dtypes())
        raise ConfigError(
            f"this device cannot train in {', '.join(sorted(map(str, missing)))}; it can in {able}",
            where=f"{_precision_name(config)[1]}, device {accelerator.current_device_name()!r}",
            fix="enable a precision that the device has, or none: fp32 runs everywhere",
        )


def _warn_of_dtypes(partition: Partition) -> None:
    """Say what trains, but hardly as its owner meant it."""
    inputs = partition.inputs
    trained = [param for group in inputs.param_groups for param in group["params"]]
    without = [param for param in trained if inputs.dtypes[param].updated in (torch.float16, torch.bfloat16)]
    if without:
        log_dist(
            f"{len(without)} parameters, such as {inputs.names[without[0]]!r}, are trained in {without[0].dtype} "
            "without fp32 masters, which loses small updates: enable bf16 or fp16, or give the model in fp32",
            level=logging.WARNING,
        )
    mixed = [name for name, module in inputs.module.named_modules() if _has_mixed_statistics(module)]
    if mixed:
        log_dist(
            f"the batch statistics of {len(mixed)} modules, such as {mixed[0]!r}, have another dtype than their "
            'weights, which torch refuses on a CPU: set "buffer_dtype" in "data_types" to the dtype of the weights, '
            'or train under "torch_autocast"',
            level=logging.WARNING,
        )


def _warn_of_vocabulary(config: Config) -> None:
    size = config.vocabulary_size
    if size is not None and size % 8:
        log_dist(
            f"vocabulary_size: {size} is not a multiple of 8, so tensor cores are not used in full: "
            f"pad the vocabulary to {-(-size // 8) * 8}",
            level=logging.WARNING,
        )


def _has_mixed_statistics(module: nn.Module) -> bool:
    if not isinstance(module, torch.nn.modules.batchnorm._NormBase):
        return False
    weight, mean = module.weight, module.running_mean
    return weight is not None and mean is not None and weight.dtype != mean.dtype


def _optimizer(arguments: Arguments, partition: Partition) -> torch.optim.Optimizer:
    groups = partition.optimizer_groups()
    given, section = arguments.optimizer, arguments.config.optimizer
    if isinstance(given, torch.optim.Optimizer):
        take_over(given, partition)
        return given
    if given is not None:
        built = given([dict(group) for group in groups])
        if not isinstance(built, torch.optim.Optimizer):
            raise ConfigError(
                f"the optimizer callable returned a {type(built).__name__}",
                where="initialize(optimizer)",
                fix="return a torch.optim.Optimizer",
            )
        check_steps_without_closure(built)
        check_updates(built, groups)
        return built
    assert section is not None
    return build_optimizer(section.type, section.params, groups)


def _what_updates(arguments: Arguments) -> Any:
    """Return the optimizer, its class, or what will build it."""
    if arguments.optimizer is not None or arguments.config.optimizer is None:
        return arguments.optimizer
    return find_optimizer(arguments.config.optimizer.type)


def _say_if_unknown(optimizer: torch.optim.Optimizer, partition: Partition, made_by: Any) -> None:
    if partition.divides and known_of(made_by) is None:
        log_dist(
            f"{type(optimizer).__name__} does not say whether it is elementwise, so each parameter is updated whole, "
            "by one rank. If it updates each element by itself, elementwise = True in its class divides it evenly; if "
            "it looks at several parameters at once, such as at a norm over all, use stage 0"
        )


def _schedule(arguments: Arguments, optimizer: torch.optim.Optimizer) -> LRSchedule | None:
    given, section = arguments.lr_scheduler, arguments.config.scheduler
    if given is None:
        return None if section is None else build_schedule(section.type, section.params, optimizer)
    schedule: LRSchedule = given if hasattr(given, "step") else given(optimizer)
    drives = getattr(schedule, "optimizer", None)
    if isinstance(drives, torch.optim.Optimizer) and drives is not optimizer:
        raise ConfigError(
            "the schedule drives another optimizer than the engine's, so it would change nothing here",
            where="initialize(lr_scheduler)",
            fix="pass a callable that takes the optimizer, or pass the schedule's optimizer as optimizer=",
        )
    return schedule


def _observers(config: Config, choice: Choice) -> list[Any]:
    if comm.get_rank() != 0:
        return []
    found: list[Any] = []
    if config.steps_per_print is not None:
        found.append(ProgressLine(config.steps_per_print))
    if choice.monitors:
        found.append(MonitorObserver([monitor(section) for monitor, section in choice.monitors]))
    return found
