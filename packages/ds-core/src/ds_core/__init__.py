"""ds-core: DeepSpeed's runtime, unbundled. The root API: ``initialize``, ``init_distributed`` and what they return.

Names are resolved on first use (PEP 562), so ``import ds_core`` loads no torch.

>>> import ds_core
>>> ds_core.__version__
'0.1.0'
"""

from __future__ import annotations

import importlib
from typing import Any

from ds_core._packages import LATER, PACKAGE_OF_ATTRIBUTE

__version__ = "0.1.0"

_ERRORS = (
    "CheckpointError",
    "CommError",
    "ConfigError",
    "DataError",
    "DsError",
    "EngineError",
    "LaunchError",
    "LossScaleError",
    "MissingPackageError",
    "NoCheckpointError",
    "NotBuiltError",
    "PluginError",
)
_HERE = {
    "initialize": "ds_core.engine.initialize",
    "add_config_arguments": "ds_core.engine.initialize",
    "DeepSpeedEngine": "ds_core.engine.engine",
    "init_distributed": "ds_core.comm",
    "get_accelerator": "ds_core.accelerator",
    "DeepSpeedConfig": "ds_core.config",
    "DeepSpeedConfigError": "ds_core.config",
    "DeepSpeedDataLoader": "ds_core.data",
    "DeepSpeedOptimizer": "ds_core.engine.optimizer_face",
    "RepeatingLoader": "ds_core.data",
    "logger": "ds_core.log",
    "log_dist": "ds_core.log",
    **dict.fromkeys(_ERRORS, "ds_core.errors"),
}
_MODULES = (
    "accelerator",
    "activation",
    "checkpoint",
    "checkpointing",
    "cli",
    "comm",
    "config",
    "data",
    "elasticity",
    "errors",
    "interfaces",
    "monitor",
    "ops",
    "optim",
    "registry",
    "schedules",
    "testing",
    "utils",
)
_CONSTANTS = {
    "TORCH_DISTRIBUTED_DEFAULT_PORT": 29500,
    "ADAM_OPTIMIZER": "adam",
    "LAMB_OPTIMIZER": "lamb",
    "MUON_OPTIMIZER": "muon",
}

__all__ = sorted([*_HERE, *_MODULES, *_CONSTANTS])


def __getattr__(name: str) -> Any:
    if name in _HERE:
        value = getattr(importlib.import_module(_HERE[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"ds_core.{name}")
    elif name in _CONSTANTS:
        value = _CONSTANTS[name]
    elif name in PACKAGE_OF_ATTRIBUTE:
        value = _from_package(name, *PACKAGE_OF_ATTRIBUTE[name])
    elif name in LATER:
        from ds_core.errors import NotBuiltError

        raise NotBuiltError(
            f"ds_core.{name} is not built yet: it comes with a later release of {LATER[name]}",
            fix=f"pip install --upgrade {LATER[name]}",
        )
    else:
        raise AttributeError(f"module 'ds_core' has no attribute {name!r}")
    globals()[name] = value
    return value


def _from_package(name: str, package: str, module: str) -> Any:
    from ds_core.errors import MissingPackageError

    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise MissingPackageError(
            f"ds_core.{name} needs {package}: pip install {package}", fix=f"pip install {package}"
        ) from error
    return found if module.rpartition(".")[2] in (name, f"ds_{name}") else getattr(found, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
