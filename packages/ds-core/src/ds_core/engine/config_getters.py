"""The engine's getters of the configuration, one of DeepSpeed's names each (spec/core.md 3.3)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import torch

from ds_core.engine.zero_getters import ZeroGetters, getter

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ds_core.config import Config, Section
    from ds_core.engine.parts import Parts

__all__ = ["ConfigGetters"]


class ConfigGetters(ZeroGetters):
    """What ``DeepSpeedEngine`` was configured with; a section that is off gives its own, ineffective, values.

    Beside the methods below there is one for each key of ``zero_optimization``, ``flops_profiler`` and ``autotuning``,
    such as ``flops_profiler_profile_step()``.
    """

    parts: Parts
    _config: Config
    client_optimizer: Any
    if TYPE_CHECKING:

        @property
        def basic_optimizer(self) -> Optimizer | None: ...

    def gradient_clipping(self) -> float:
        """Return the largest gradient norm, 0 for any: the configuration's, or what was set on the optimizer's face."""
        return self.parts.clip.max_norm

    def steps_per_print(self) -> int | None:
        return self._config.steps_per_print

    def postscale_gradients(self) -> bool:
        """Return whether gradients are divided after they were summed over the ranks, not before."""
        return not self._config.prescale_gradients

    def gradient_predivide_factor(self) -> float:
        return self._config.gradient_predivide_factor

    def sparse_gradients_enabled(self) -> bool:
        return self._config.sparse_gradients

    def graph_harvesting(self) -> bool:
        return self._config.graph_harvesting

    def wall_clock_breakdown(self) -> bool:
        return self._config.wall_clock_breakdown

    def memory_breakdown(self) -> bool:
        return self._config.memory_breakdown

    def dump_state(self) -> bool:
        return self._config.dump_state

    # -- precision --------------------------------------------------------------------------------------------------

    def fp16_enabled(self) -> bool:
        return self._config.enables("fp16")

    def bfloat16_enabled(self) -> bool:
        return self._config.enables("bf16")

    def amp_enabled(self) -> bool:
        """Return False: a configuration with NVIDIA's Apex on is refused."""
        return bool(self._section("amp").enabled)

    def amp_params(self) -> dict[str, Any]:
        """Return the arguments for Apex, which nothing reads."""
        return _as_given(self._section("amp"), without="enabled")

    def fp16_auto_cast(self) -> bool:
        return self._config.fp16.auto_cast

    def torch_autocast_enabled(self) -> bool:
        return self._config.enables("torch_autocast")

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

    # -- optimizer and schedule -------------------------------------------------------------------------------------

    def optimizer_name(self) -> str | None:
        """Return the class name of the client's optimizer where one was passed, else the configured name."""
        if self._config.optimizer is not None and self.client_optimizer is None:
            return self._config.optimizer.type
        return None if self.basic_optimizer is None else type(self.basic_optimizer).__name__

    def optimizer_params(self) -> dict[str, Any] | None:
        """Return a copy of the configured arguments of the optimizer; None without a section ``optimizer``."""
        return None if self._config.optimizer is None else dict(self._config.optimizer.params)

    def scheduler_name(self) -> str | None:
        """Return the configured name of the learning-rate schedule; None without a section ``scheduler``."""
        return None if self._config.scheduler is None else self._config.scheduler.type

    def scheduler_params(self) -> dict[str, Any] | None:
        """Return a copy of the configured arguments of the schedule; None without a section ``scheduler``."""
        return None if self._config.scheduler is None else dict(self._config.scheduler.params)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def use_node_local_storage(self) -> bool:
        return self._config.checkpoint.use_node_local_storage

    def load_universal_checkpoint(self) -> bool:
        return self._config.checkpoint.load_universal

    def checkpoint_tag_validation_enabled(self) -> bool:
        """Return whether ranks compare the tags they save under."""
        return self._config.checkpoint.tag_validation != "Ignore"

    def checkpoint_tag_validation_fail(self) -> bool:
        """Return whether tags that differ are an error."""
        return self._config.checkpoint.tag_validation == "Fail"

    # -- sections that few configurations have ----------------------------------------------------------------------

    def elasticity_enabled(self) -> bool:
        return bool(self._section("elasticity").enabled)

    def aio_config(self) -> dict[str, Any]:
        """Return the section ``aio`` under DeepSpeed's keys."""
        return _as_given(self._section("aio"))

    def tensor_parallel_config(self) -> Section:
        """Return the section ``tensor_parallel``."""
        return cast("Section", self._section("tensor_parallel"))

    def autotp_size(self) -> int:
        return int(self._section("tensor_parallel").autotp_size)

    def pld_enabled(self) -> bool:
        return bool(self._section("progressive_layer_drop").enabled)

    def pld_params(self) -> dict[str, Any]:
        """Return the section ``progressive_layer_drop`` without its ``enabled``."""
        return _as_given(self._section("progressive_layer_drop"), without="enabled")

    def pld_theta(self) -> float:
        return float(self._section("progressive_layer_drop").theta)

    def pld_gamma(self) -> float:
        return float(self._section("progressive_layer_drop").gamma)

    def curriculum_enabled_legacy(self) -> bool:
        """Return whether the top-level section ``curriculum_learning`` is on."""
        return bool(self._section("curriculum_learning").enabled)

    def curriculum_params_legacy(self) -> dict[str, Any]:
        """Return the top-level section ``curriculum_learning`` under DeepSpeed's keys."""
        return _as_given(self._section("curriculum_learning"))

    def curriculum_learning_enabled(self) -> bool:
        """Return whether ``data_efficiency.data_sampling.curriculum_learning`` is on."""
        return bool(self._section("data_efficiency").data_sampling.curriculum_learning.enabled)

    def curriculum_learning_config(self) -> dict[str, Any]:
        """Return ``data_efficiency.data_sampling.curriculum_learning`` under DeepSpeed's keys."""
        return _as_given(self._section("data_efficiency").data_sampling.curriculum_learning)

    def random_ltd_enabled(self) -> bool:
        """Return whether ``data_efficiency.data_routing.random_ltd`` is on."""
        return bool(self._section("data_efficiency").data_routing.random_ltd.enabled)

    def random_ltd_config(self) -> dict[str, Any]:
        """Return ``data_efficiency.data_routing.random_ltd`` under DeepSpeed's keys."""
        return _as_given(self._section("data_efficiency").data_routing.random_ltd)

    def _section(self, name: str) -> Any:
        # Any: these classes are imported with the configurations that have them, not with the engine.
        return self._config.section(name)


def _as_given(section: Section, *, without: str = "") -> dict[str, Any]:
    found = section.model_dump(by_alias=True)
    found.pop(without, None)
    return found


ONE_FOR_EACH_KEY = {
    "flops_profiler": (
        *("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed"),
        "output_file",
    ),
    "autotuning": (
        *("enabled", "fast", "results_dir", "exps_dir", "overwrite", "start_profile_step", "end_profile_step"),
        *("metric", "metric_path", "tuner_type", "tuner_early_stopping", "tuner_num_trials", "arg_mappings"),
        *("model_info", "model_info_path", "mp_size", "max_train_batch_size", "min_train_batch_size"),
        *("max_train_micro_batch_size_per_gpu", "min_train_micro_batch_size_per_gpu"),
        "num_tuning_micro_batch_sizes",
    ),
}
"""Section -> its keys, each of which has a getter ``<section>_<key>()``. Written down: reading them from the classes
would import those with every engine."""


def _add_one_for_each_key() -> None:
    for section, keys in ONE_FOR_EACH_KEY.items():
        for key in keys:
            name = f"{section}_{key}"
            setattr(ConfigGetters, name, getter(ConfigGetters, name, section, key, Any))


_add_one_for_each_key()
