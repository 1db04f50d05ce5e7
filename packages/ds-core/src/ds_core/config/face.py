"""``DeepSpeedConfig``: a checked configuration under DeepSpeed's attribute names, and a writer of such files."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_core import log
from ds_core.config.catalog import RARE
from ds_core.config.config import Config
from ds_core.config.loading import load_config
from ds_core.config.problems import raise_problems, validate
from ds_core.config.reading import copied, read
from ds_core.config.section import PositiveInt, Section
from ds_core.config.showing import without_secrets
from ds_core.errors import ConfigError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from ds_core.config.reading import Document, Source

__all__ = ["DeepSpeedConfig", "DeepSpeedConfigWriter", "MonitorConfig", "data_parallel_world_size"]

_SECTION_OF_ATTRIBUTE = {
    "zero_config": "zero_optimization",
    "float16_config": "fp16",
    "bfloat16_config": "bf16",
}
_ATTRIBUTE_OF_SECTION = {section: attribute for attribute, section in _SECTION_OF_ATTRIBUTE.items()}


class DeepSpeedConfig:
    """Loads ``config`` and gives it under DeepSpeed's names.

    Every top-level key is an attribute: a number or a word as such, a section as an object with defaults for what was
    not given. Sections are also there as ``<key>_config``, such as ``checkpoint_config``.

    Args:
        config: as for :func:`ds_core.config.load_config`.
        mpu: an object that knows the parallel groups; only its number of data-parallel ranks is asked for.
        mesh_device: a device mesh with a dim ``data_parallel``; the same.

    Raises:
        ConfigError: lists everything that is wrong.

    >>> config = DeepSpeedConfig({"train_batch_size": 4, "zero_optimization": {"stage": 2}})
    >>> config.zero_optimization_stage, config.zero_config.overlap_comm, config.flops_profiler_config.enabled
    (2, False, False)
    """

    def __init__(self, config: Source | Document, mpu: Any = None, mesh_device: Any = None) -> None:
        self.global_rank, _ = _rank_and_world_size()
        document = read(config)
        self.world_size = data_parallel_world_size(document, mpu, mesh_device)
        self.config: Config = load_config(document, dp_world_size=self.world_size)

    def __getattr__(self, name: str) -> Any:
        # Without a config nothing was loaded yet: unpickling and copying ask before __init__ has run.
        if "config" in self.__dict__:
            section = _SECTION_OF_ATTRIBUTE.get(name, name)
            for key in (section, section.removesuffix("_config")):
                if key in Config.fields_by_key():
                    return getattr(self.config, key)
                if key in RARE or key in self.config.sections:
                    return self.config.section(key)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._attributes()})

    def _attributes(self) -> list[str]:
        """Return the attributes that differ by configuration, each value under one name, DeepSpeed's."""
        scalars = [
            name for name in Config.model_fields if name not in (*self.config.sections, "optimizer", "scheduler")
        ]
        sections = [_ATTRIBUTE_OF_SECTION.get(name, f"{name}_config") for name in self._given_sections()]
        own = [name for name, value in vars(DeepSpeedConfig).items() if isinstance(value, property)]
        return sorted([*scalars, *sections, *own, "global_rank", "world_size"])

    def _given_sections(self) -> list[str]:
        # The parts of these two are attributes of their own.
        return [name for name in self.config.sections if name not in ("optimizer", "scheduler")]

    def print(self, name: str) -> None:
        """Log every attribute and the JSON, at INFO, under the heading ``name``."""
        log.configure(None)  # who asks to see it should, also before ``initialize``
        lines = [f"{name}:", *(f"  {attribute:<40} {getattr(self, attribute)!r}" for attribute in self._attributes())]
        shown = without_secrets(self.config.raw)
        # Objects that a dict may hold, such as groups, have no JSON: they print as they are.
        log.logger.info("%s\n  json = %s", "\n".join(lines), json.dumps(shown, indent=4, default=str))

    @property
    def zero_optimization_stage(self) -> int:
        return self.config.zero_optimization.stage

    @property
    def zero_enabled(self) -> bool:
        return self.config.zero_optimization.stage > 0

    @property
    def optimizer_name(self) -> str | None:
        return self.config.optimizer.type if self.config.optimizer else None

    @property
    def optimizer_params(self) -> dict[str, Any] | None:
        return dict(self.config.optimizer.params) if self.config.optimizer else None

    @property
    def optimizer_legacy_fusion(self) -> bool:
        return self.config.optimizer is not None and self.config.optimizer.legacy_fusion

    @property
    def scheduler_name(self) -> str | None:
        return self.config.scheduler.type if self.config.scheduler else None

    @property
    def scheduler_params(self) -> dict[str, Any] | None:
        return dict(self.config.scheduler.params) if self.config.scheduler else None

    @property
    def monitor_config(self) -> MonitorConfig:
        """The sections of all monitors."""
        return MonitorConfig(*(self.config.section(name) for name in MonitorConfig.__dataclass_fields__))


@dataclass(frozen=True)
class MonitorConfig:
    """The sections of the monitors.

    >>> DeepSpeedConfig({"train_batch_size": 1, "csv_monitor": {"enabled": True}}).monitor_config.enabled
    True
    """

    tensorboard: Any
    wandb: Any
    csv_monitor: Any
    comet: Any

    @property
    def enabled(self) -> bool:
        """Whether one of them is on."""
        return any(getattr(self, name).enabled for name in self.__dataclass_fields__)


class _SequenceParallel(Section):
    """The one key that is read before the configuration is checked, because the batch sizes depend on it."""

    sequence_parallel_size: PositiveInt | None = None


def data_parallel_world_size(config: Source | Document, mpu: Any = None, mesh_device: Any = None) -> int:
    """Return the number of data-parallel ranks, as DeepSpeed's batch rule counts them.

    That is ``mpu.get_data_parallel_world_size()`` where there is one, else the ranks of ``torch.distributed`` (1
    before it is initialised) divided by ``mpu.get_sequence_parallel_world_size()``; without ``mpu`` the size of
    ``mesh_device``'s dim ``data_parallel``; without either the ranks divided by ``sequence_parallel_size``.

    Raises:
        ConfigError: the ranks cannot be divided so, or ``mpu`` or ``mesh_device`` cannot say.

    >>> data_parallel_world_size({"train_batch_size": 4})
    1
    """
    _, world_size = _rank_and_world_size()
    if mpu is not None:
        if hasattr(mpu, "get_data_parallel_world_size"):
            return int(mpu.get_data_parallel_world_size())
        if hasattr(mpu, "get_sequence_parallel_world_size"):
            return _divided(
                world_size, int(mpu.get_sequence_parallel_world_size()), "mpu.get_sequence_parallel_world_size()"
            )
        raise ConfigError(
            f"mpu, a {type(mpu).__name__}, has neither get_data_parallel_world_size() nor "
            "get_sequence_parallel_world_size()",
            where="DeepSpeedConfig(mpu)",
            fix="give it one of them",
        )
    if mesh_device is not None:
        dims = tuple(mesh_device.mesh_dim_names or ())
        if "data_parallel" not in dims:
            raise ConfigError(
                f"mesh_device has no dim 'data_parallel', its dims are {dims}",
                where="DeepSpeedConfig(mesh_device)",
                fix='pass mesh_dim_names=("data_parallel", "sequence_parallel") when making it',
            )
        return int(mesh_device.size(dims.index("data_parallel")))
    size = _sequence_parallel_size(config)
    return world_size if size is None else _divided(world_size, size, "sequence_parallel_size")


def _sequence_parallel_size(config: Source | Document) -> int | None:
    raw: Mapping[str, Any] = read(config).raw
    key = "sequence_parallel_size"
    # A wrong value is told with all other problems, by who loads the configuration.
    section, _ = validate(_SequenceParallel, {key: raw[key]} if key in raw else {})
    return None if section is None else section.sequence_parallel_size


def _divided(world_size: int, sequence_parallel_size: int, name: str) -> int:
    if sequence_parallel_size < 1 or world_size % sequence_parallel_size:
        raise ConfigError(
            f"{world_size} ranks cannot be divided into groups of {sequence_parallel_size}",
            where=name,
            fix=f"use a divisor of {world_size}, or start another number of ranks",
        )
    return world_size // sequence_parallel_size


def _rank_and_world_size() -> tuple[int, int]:
    # Who has initialised torch.distributed has imported it; a configuration alone must not load torch.
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return int(distributed.get_rank()), int(distributed.get_world_size())


class DeepSpeedConfigWriter:
    """Puts a configuration file together; nothing is checked.

    Args:
        data: keys to start with; copied.

    >>> writer = DeepSpeedConfigWriter({"train_batch_size": 8})
    >>> writer.add_config("zero_optimization", {"stage": 2})
    >>> writer.write_config("ds_config.json")
    >>> DeepSpeedConfig("ds_config.json").zero_optimization_stage
    2
    """

    def __init__(self, data: Mapping[str, Any] | None = None) -> None:
        self.data: dict[str, Any] = copied(data or {}, where="DeepSpeedConfigWriter")

    def add_config(self, key: str, value: Any) -> None:
        """Set the top-level ``key``."""
        self.data[key] = value

    def load_config(self, filename: str | os.PathLike[str]) -> None:
        """Take the keys of a file of JSON or HJSON in place of those so far.

        Raises:
            ConfigError: it cannot be read, or gives a key twice.
        """
        document = read(Path(filename))
        raise_problems(document.duplicates(), where=document.where)
        self.data = document.raw

    def write_config(self, filename: str | os.PathLike[str]) -> None:
        """Write the keys so far as JSON.

        Raises:
            ConfigError: a value has no JSON; the file is left as it was.
        """
        try:
            text = json.dumps(self.data, indent=4)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"the configuration cannot be written as JSON: {error}", where=str(filename), fix="use plain values"
            ) from error
        Path(filename).write_text(text + "\n", encoding="utf-8")
