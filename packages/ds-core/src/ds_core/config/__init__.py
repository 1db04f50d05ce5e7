"""The configuration: every section and key, checked all at once. Loads no torch.

>>> from ds_core.config import load_config
>>> load_config({"train_micro_batch_size_per_gpu": 2}, dp_world_size=4).train_batch_size
8
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ds_core.config.batch import BatchSizes, resolve_batch
from ds_core.config.config import Config
from ds_core.config.face import DeepSpeedConfig, DeepSpeedConfigWriter
from ds_core.config.loading import Examined, examine, find_problems, load_config
from ds_core.config.problems import Problem
from ds_core.config.section import Count, DtypeName, Int, NotBuilt, Number, PositiveInt, Section, key
from ds_core.config.sections.choices import CheckpointSection, PartitionSection, PrecisionSection
from ds_core.config.sections.monitors import CsvMonitorSection
from ds_core.config.sections.optimizer import OptimizerSection, SchedulerSection
from ds_core.config.sections.precision import Bf16Section, DataTypesSection, Fp16Section, TorchAutocastSection
from ds_core.config.sections.zero import OffloadOptimizerSection, OffloadParamSection, ZeroSection
from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from ds_core.config.helpers import (
        DeepSpeedConfigModel,
        DeepSpeedConfigObject,
        ScientificNotationEncoder,
        dict_raise_error_on_duplicate_keys,
        get_config_default,
        get_dict_param,
        get_list_param,
        get_scalar_param,
        pp_int,
    )
    from ds_core.config.inference_loading import load_inference_config

DeepSpeedConfigError = ConfigError

# Imported on first use, from the first module that has the name: training needs none of them.
_ON_USE = ("helpers", "inference_loading")

__all__ = [
    # loading
    "Config",
    "ConfigError",
    "Problem",
    "Examined",
    "examine",
    "find_problems",
    "load_config",
    # what a plugin's own section is made of
    "Count",
    "DtypeName",
    "Int",
    "NotBuilt",
    "Number",
    "PositiveInt",
    "Section",
    "key",
    # sections
    "Bf16Section",
    "CheckpointSection",
    "CsvMonitorSection",
    "DataTypesSection",
    "Fp16Section",
    "OffloadOptimizerSection",
    "OffloadParamSection",
    "OptimizerSection",
    "PartitionSection",
    "PrecisionSection",
    "SchedulerSection",
    "TorchAutocastSection",
    "ZeroSection",
    # batch arithmetic
    "BatchSizes",
    "resolve_batch",
    # DeepSpeed's names
    "DeepSpeedConfig",
    "DeepSpeedConfigError",
    "DeepSpeedConfigModel",
    "DeepSpeedConfigObject",
    "DeepSpeedConfigWriter",
    "ScientificNotationEncoder",
    "dict_raise_error_on_duplicate_keys",
    "get_config_default",
    "get_dict_param",
    "get_list_param",
    "get_scalar_param",
    "load_inference_config",
    "pp_int",
]


def __getattr__(name: str) -> Any:
    for module in _ON_USE if name in __all__ else ():
        found = import_module(f"{__name__}.{module}")
        if name in found.__all__:
            globals()[name] = getattr(found, name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
