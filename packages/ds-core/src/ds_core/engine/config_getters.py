"""The engine's getters of the configuration, one of DeepSpeed's names each (spec/core.md 3.3)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ds_core.config import Config
    from ds_core.engine.parts import Parts

__all__ = ["ConfigGetters"]


class ConfigGetters:
    """What ``DeepSpeedEngine`` was configured with; a section that is off gives its own, ineffective, values."""

    parts: Parts
    _config: Config
    if TYPE_CHECKING:

        @property
        def basic_optimizer(self) -> Optimizer | None: ...

    def gradient_clipping(self) -> float:
        """Return the largest gradient norm, 0 for any: the configuration's, or what was set on the optimizer's face."""
        return self.parts.clip.max_norm

    def steps_per_print(self) -> int | None:
        return self._config.steps_per_print

    def fp16_enabled(self) -> bool:
        return self._config.is_on("fp16")

    def bfloat16_enabled(self) -> bool:
        return self._config.is_on("bf16")

    def amp_enabled(self) -> bool:
        """Return False: NVIDIA's Apex is not supported."""
        return False

    def fp16_auto_cast(self) -> bool:
        return self._config.fp16.auto_cast

    def torch_autocast_enabled(self) -> bool:
        return self._config.is_on("torch_autocast")

    def torch_autocast_dtype(self) -> torch.dtype | None:
        """Return the dtype that forward runs under autocast with; None: it does not."""
        return self.parts.partition.inputs.plan.autocast

    def loss_scale(self) -> float:
        """Return the configured scale; 0: it is found while training, see :attr:`cur_scale`."""
        return self._config.fp16.loss_scale

    def dynamic_loss_scale(self) -> bool:
        return self._config.fp16.loss_scale == 0

    def initial_dynamic_scale(self) -> int:
        return self._config.fp16.initial_dynamic_scale()

    def dynamic_loss_scale_args(self) -> dict[str, Any]:
        """Return the arguments of ``DynamicLossScaler`` as configured."""
        return self._config.fp16.dynamic_loss_scale_args()

    @property
    def communication_data_type(self) -> torch.dtype:
        """The dtype most gradient elements are reduced in."""
        return self._most("reduce")

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """Return (dtype of the model, dtype its gradients accumulate in), of most elements."""
        return self._most("stored"), self._most("accumulate")

    def _most(self, field: str) -> torch.dtype:
        numels: Counter[Any] = Counter()
        for param, dtypes in self.parts.partition.inputs.dtypes.items():
            numels[getattr(dtypes, field)] += param.numel()
        return numels.most_common(1)[0][0] if numels else torch.float32

    def zero_optimization_stage(self) -> int:
        return self._config.zero_optimization.stage

    def zero_optimization(self) -> bool:
        return self.zero_optimization_stage() > 0

    def zero_optimization_partition_gradients(self) -> bool:
        return self.zero_optimization_stage() >= 2

    def zero_optimization_partition_weights(self) -> bool:
        return self.zero_optimization_stage() >= 3

    def optimizer_name(self) -> str | None:
        """Return the configured name, else the class name of the client's optimizer."""
        if self._config.optimizer is not None:
            return self._config.optimizer.type
        return None if self.basic_optimizer is None else type(self.basic_optimizer).__name__
