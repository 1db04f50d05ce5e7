"""``DeepSpeedConfig``: a checked configuration under DeepSpeed's attribute names."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ds_core.config.loading import load_config
from ds_core.errors import NotBuiltError

if TYPE_CHECKING:
    from ds_core.config.config import Config
    from ds_core.config.reading import Source

__all__ = ["DeepSpeedConfig"]

_SECTION_OF_ATTRIBUTE = {
    "zero_config": "zero_optimization",
    "float16_config": "fp16",
    "bfloat16_config": "bf16",
}


class DeepSpeedConfig:
    """Loads ``config`` and gives it under DeepSpeed's names; every key of ``Config`` is an attribute as well.

    The number of data-parallel ranks is that of ``torch.distributed``, 1 before it is initialised.

    >>> DeepSpeedConfig({"train_batch_size": 4, "zero_optimization": {"stage": 2}}).zero_optimization_stage
    2
    """

    def __init__(self, config: Source, mpu: Any = None, mesh_device: Any = None) -> None:
        for name, value in (("mpu", mpu), ("mesh_device", mesh_device)):
            if value is not None:
                raise NotBuiltError(
                    f"DeepSpeedConfig({name}=...) is not built yet: it comes with a later release of ds-core",
                    fix=f"leave {name} out",
                )
        self.config: Config = load_config(config, dp_world_size=_world_size())

    def __getattr__(self, name: str) -> Any:
        if name == "config":  # not loaded yet: unpickling and copying ask before __init__ has run
            raise AttributeError(name)
        return getattr(self.config, _SECTION_OF_ATTRIBUTE.get(name, name))

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
        return self.config.optimizer.params if self.config.optimizer else None

    @property
    def scheduler_name(self) -> str | None:
        return self.config.scheduler.type if self.config.scheduler else None

    @property
    def scheduler_params(self) -> dict[str, Any] | None:
        return self.config.scheduler.params if self.config.scheduler else None


def _world_size() -> int:
    # Who has initialised torch.distributed has imported it; a configuration alone must not load torch.
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 1
    return int(distributed.get_world_size())
