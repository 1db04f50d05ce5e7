"""Pins what users may rely on: the names of ds_core, the entry points, and the errors of names not here yet."""

from __future__ import annotations

import importlib.metadata as metadata
import subprocess
import sys

import pytest

import ds_core
from ds_core._packages import LATER, PACKAGE_OF_ATTRIBUTE, PACKAGE_OF_PLUGIN
from ds_core.errors import DsError, MissingPackageError, NotBuiltError
from ds_core.registry import SEAMS

PUBLIC = {
    # functions
    "add_config_arguments",
    "get_accelerator",
    "init_distributed",
    "initialize",
    "log_dist",
    # classes and values
    "ADAM_OPTIMIZER",
    "DeepSpeedConfig",
    "DeepSpeedConfigError",
    "DeepSpeedDataLoader",
    "DeepSpeedEngine",
    "DeepSpeedOptimizer",
    "LAMB_OPTIMIZER",
    "MUON_OPTIMIZER",
    "RepeatingLoader",
    "TORCH_DISTRIBUTED_DEFAULT_PORT",
    "logger",
    # errors
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
    # modules
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
}
ENTRY_POINTS = {
    ("ds_core.accelerator", "cpu"),
    ("ds_core.accelerator", "cuda"),
    ("ds_core.activation", "torch"),
    ("ds_core.checkpoint", "plain"),
    ("ds_core.cli", "config"),
    ("ds_core.cli", "report"),
    ("ds_core.engine", "plain"),
    ("ds_core.monitor", "csv_monitor"),
    ("ds_core.ops", "torch"),
    ("ds_core.optimizer", "adam"),
    ("ds_core.optimizer", "adamw"),
    ("ds_core.partition", "replicated"),
    ("ds_core.precision", "fp32"),
    ("ds_core.scheduler", "WarmupCosineLR"),
    ("ds_core.scheduler", "WarmupDecayLR"),
    ("ds_core.scheduler", "WarmupLR"),
    ("console_scripts", "ds"),
}
DEEPSPEED = """
    initialize init_distributed add_config_arguments add_tuning_arguments default_inference_config init_inference
    tp_model_init log_dist is_compile_supported get_accelerator replace_transformer_layer revert_transformer_layer
    set_autotp_mode set_optimizer_flags
    DeepSpeedEngine DeepSpeedHybridEngine PipelineEngine PipelineModule InferenceEngine DeepSpeedInferenceConfig
    DeepSpeedConfig DeepSpeedConfigError DeepSpeedOptimizer DeepSpeedDataLoader DeepSpeedTransformerLayer
    DeepSpeedTransformerConfig OnDevice
    accelerator autotuning checkpoint checkpointing comm compile compression domino elasticity inference io linear
    model_implementations module_inject moe monitor nebula ops pipe profiling runtime utils zero constants
    logger dist HAS_TRITON TORCH_DISTRIBUTED_DEFAULT_PORT ADAM_OPTIMIZER LAMB_OPTIMIZER MUON_OPTIMIZER
    DeepSpeedOptimizerCallable DeepSpeedSchedulerCallable
""".split()  # noqa: SIM905, a hundred quotes would hide the words
"""What ``import deepspeed`` offers at its root (0.19.6), without the dunder names."""


def test_public_names_are_pinned() -> None:
    assert set(ds_core.__all__) == PUBLIC
    assert set(dir(ds_core)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_resolve(name: str) -> None:
    assert getattr(ds_core, name) is not None
    assert getattr(ds_core, name) is getattr(ds_core, name)


def test_every_error_is_at_the_root() -> None:
    errors = [name for name in ds_core.errors.__all__ if name.endswith("Error")]
    assert [getattr(ds_core, name) for name in errors] == [getattr(ds_core.errors, name) for name in errors]


def test_errors_are_there_without_torch() -> None:
    code = "import sys, ds_core; ds_core.CheckpointError, ds_core.ConfigError; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_entry_points_are_pinned() -> None:
    found = {(entry.group, entry.name) for entry in metadata.distribution("ds-core").entry_points}
    assert found == ENTRY_POINTS


def test_version_is_that_of_the_distribution() -> None:
    assert ds_core.__version__ == metadata.version("ds-core")


def test_constants_are_deepspeeds() -> None:
    assert ds_core.TORCH_DISTRIBUTED_DEFAULT_PORT == 29500
    assert (ds_core.ADAM_OPTIMIZER, ds_core.LAMB_OPTIMIZER, ds_core.MUON_OPTIMIZER) == ("adam", "lamb", "muon")


def outcome(name: str) -> str:
    """Resolve ``ds_core.<name>`` in a fresh process, where no other test has imported a submodule of that name."""
    code = (
        "import ds_core\n"
        "from ds_core.errors import DsError\n"
        "try:\n"
        f"    ds_core.{name}\n"
        "except DsError as error:\n"
        "    print(type(error).__name__, error)\n"
        "else:\n"
        "    print('here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_every_root_name_of_deepspeed_is_here_or_says_what_brings_it() -> None:
    known = PUBLIC | set(PACKAGE_OF_ATTRIBUTE) | set(LATER)
    assert sorted(set(DEEPSPEED) - known) == []


@pytest.mark.parametrize("name", sorted(LATER))
def test_a_name_of_a_later_release_says_so(name: str) -> None:
    with pytest.raises(NotBuiltError, match=f"ds_core.{name} is not built yet.* {LATER[name]}"):
        getattr(ds_core, name)
    assert not hasattr(ds_core, name)


@pytest.mark.parametrize("name", ["zero", "PipelineModule", "init_inference", "DeepSpeedTransformerLayer"])
def test_a_name_of_a_missing_package_names_it(name: str) -> None:
    package, module = PACKAGE_OF_ATTRIBUTE[name]
    found = outcome(name)
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        assert found.startswith(f"{MissingPackageError.__name__} ds_core.{name} needs {package}: pip install {package}")
    else:
        assert found == "here\n", module


def test_a_name_nobody_knows_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ds_core' has no attribute 'initialise'") as caught:
        ds_core.initialise  # noqa: B018
    assert not isinstance(caught.value, DsError)


def test_the_tables_name_seams_and_packages_that_can_exist() -> None:
    assert {seam for seam, _ in PACKAGE_OF_PLUGIN} <= set(SEAMS)
    of_attributes = {package for package, _ in PACKAGE_OF_ATTRIBUTE.values()}
    assert {*PACKAGE_OF_PLUGIN.values(), *LATER.values(), *of_attributes} <= {
        "ds-activation",
        "ds-ckpt",
        "ds-compat",
        "ds-core",
        "ds-fp16",
        "ds-inference",
        "ds-kernels",
        "ds-launcher",
        "ds-pipe",
        "ds-zero",
    }
    for name, (package, module) in PACKAGE_OF_ATTRIBUTE.items():
        assert module.split(".")[0] == package.replace("-", "_"), name
