"""What happens to the inputs of checkpointed calls: as ``configure`` says, or as the engine whose forward runs says."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from ds_activation.host_copies import clear_all
from ds_activation.kept import Buffers, Keeping
from ds_activation.model_parallel import ALONE, place_in, refuse_no_mpu
from ds_core import log
from ds_core.config import examine
from ds_core.config.problems import raise_problems, validate
from ds_core.config.sections.activation import ActivationCheckpointingSection
from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ds_core.config.reading import Source

__all__ = [
    "Settings",
    "configure",
    "configured",
    "current",
    "forget",
    "in_force",
    "is_configured",
    "partition_activations_in_checkpoint",
    "reset",
    "set_num_layers",
]

SECTION = "activation_checkpointing"


@dataclass(frozen=True)
class Settings:
    """The flags of the section, and the mpu. Two with the same flags are equal, and have buffers of their own.

    Raises:
        ConfigError: buffers are asked for, and nothing to put there or no number of them.
    """

    partition_activations: bool = False
    cpu_checkpointing: bool = False
    contiguous_memory_optimization: bool = False
    number_checkpoints: int | None = None
    synchronize_checkpoint_boundary: bool = False
    profile: bool = False
    mpu: Any = None
    buffers: Buffers = field(default_factory=Buffers, init=False, repr=False, compare=False)
    _checked: set[tuple[object, ...]] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.contiguous_memory_optimization:
            return
        if not self.partition_activations:
            raise ConfigError(
                "contiguous_memory_optimization is for divided inputs, and partition_activations is off",
                where=f"{SECTION}.contiguous_memory_optimization",
                fix="set partition_activations too, or leave it out",
            )
        if not self.number_checkpoints:
            raise ConfigError(
                "contiguous_memory_optimization makes number_checkpoints buffers, and that is "
                f"{self.number_checkpoints}",
                where=f"{SECTION}.number_checkpoints",
                fix="set it to the number of checkpointed calls between two backwards, or leave "
                "contiguous_memory_optimization out",
            )

    @classmethod
    def from_section(cls, section: ActivationCheckpointingSection, mpu: Any = None) -> Settings:
        """Return what ``section`` says; keys of it that are not about the inputs of calls are not read."""
        return cls(**{name: getattr(section, name) for name in _FLAGS}, mpu=mpu)

    def keeping(self) -> Keeping | None:
        """Return how inputs are kept, None where all of them are as they are."""
        if not (self.partition_activations or self.cpu_checkpointing):
            return None
        return Keeping(
            place_in(self.mpu) if self.partition_activations else ALONE,
            self.cpu_checkpointing,
            self.buffers if self.contiguous_memory_optimization else None,
            self.number_checkpoints or 0,
            self._checked,
        )


_FLAGS = tuple(each.name for each in fields(Settings) if each.init and each.name != "mpu")

_configured = Settings()
_is_configured = False
_of_engine: ContextVar[Settings | None] = ContextVar("ds_activation_settings", default=None)


def configured() -> Settings:
    """Return the settings of :func:`configure`; the same object until it is called again."""
    return _configured


def current() -> Settings:
    """Return the settings in force: those of the engine whose forward runs, else those of :func:`configure`."""
    of_engine = _of_engine.get()
    return _configured if of_engine is None else of_engine


@contextmanager
def in_force(settings: Settings) -> Iterator[None]:
    """Run the body with ``settings``, whatever :func:`configure` says."""
    token = _of_engine.set(settings)
    try:
        yield
    finally:
        _of_engine.reset(token)


def configure(
    mpu_: Any,
    deepspeed_config: Source | None = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Set what happens to the inputs of checkpointed calls, in place of all that was set before except the mpu.

    Needs no process group. Nothing is set where something is wrong.

    Args:
        mpu_: has ``get_model_parallel_rank()``, ``get_model_parallel_world_size()`` and ``get_model_parallel_group()``,
            or the same with ``tensor_model_parallel``; None: the one of an earlier call.
        deepspeed_config: a configuration, of which the section ``activation_checkpointing`` alone is read.
        partition_activations: over the config's ``partition_activations``; so are the others over their keys.
        contiguous_checkpointing: ``contiguous_memory_optimization``.
        num_checkpoints: ``number_checkpoints``.
        checkpoint_in_cpu: ``cpu_checkpointing``.
        synchronize: ``synchronize_checkpoint_boundary``.
        profile: ``profile``.

    Raises:
        ConfigError: what is wrong.
    """
    global _configured, _is_configured
    arguments = {
        "partition_activations": partition_activations,
        "contiguous_memory_optimization": contiguous_checkpointing,
        "number_checkpoints": num_checkpoints,
        "cpu_checkpointing": checkpoint_in_cpu,
        "synchronize_checkpoint_boundary": synchronize,
        "profile": profile,
    }
    section = _section(deepspeed_config, {key: value for key, value in arguments.items() if value is not None})
    settings = Settings.from_section(section, _configured.mpu if mpu_ is None else mpu_)
    if settings.mpu is not None:
        refuse_no_mpu(settings.mpu)
    _configured, _is_configured = settings, True
    if settings.profile:
        log.configure(None)  # or nobody would see the lines that were asked for
    if settings.partition_activations and settings.mpu is None:
        log.log_dist(
            "partition_activations divides over one rank, which saves nothing: checkpointing.configure got no mpu",
            level=logging.WARNING,
        )
    log.log_dist("activation checkpointing: " + ", ".join(f"{name}={getattr(settings, name)}" for name in _FLAGS))


def _section(source: Source | None, arguments: dict[str, Any]) -> ActivationCheckpointingSection:
    """Return the section in ``source`` with ``arguments`` over it; what is wrong elsewhere is not looked at."""
    flags: dict[str, Any] = {}
    if source is not None:
        found = examine(source)
        raise_problems([each for each in found.problems if each.keys[:1] == (SECTION,)], where=found.document.where)
        for each in found.warnings:
            if each.keys[:1] == (SECTION,):
                log.log_dist(f"ignored in compatibility mode: {each}", level=logging.WARNING)
        section = found.config.section(SECTION)
        flags = {name: getattr(section, name) for name in _FLAGS}
    merged, problems = validate(ActivationCheckpointingSection, flags | arguments, path=(SECTION,))
    raise_problems(problems, where="arguments of checkpointing.configure")
    assert merged is not None
    return merged


def is_configured() -> bool:
    """Return whether :func:`configure` was called."""
    return _is_configured


def reset() -> None:
    """Let go of the memory in which inputs are kept: after a forward that gets no backward."""
    for buffers in list(Buffers.everywhere):
        buffers.clear()
    clear_all()


def set_num_layers(num_layers: int) -> None:
    """Set ``number_checkpoints``."""
    global _configured
    _configured = replace(_configured, number_checkpoints=num_layers)


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Set ``partition_activations``."""
    global _configured
    _configured = replace(_configured, partition_activations=partition_activation)
    log.log_dist(f"activation checkpointing: partition_activations={partition_activation}")


def forget() -> None:
    """Be as after a fresh import; for tests."""
    global _configured, _is_configured
    _configured, _is_configured = Settings(), False
