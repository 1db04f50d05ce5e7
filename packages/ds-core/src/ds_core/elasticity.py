"""Elasticity under DeepSpeed's names: ``ds_core.elasticity.compute_elastic_config(...)``. Loads no torch.

What a job started by us uses is :mod:`ds_core.config.elastic`; these functions are for whoever plans a job from
outside, such as a launcher or a scheduler. Restarting a job on other GPUs is not built yet.

>>> from ds_core.elasticity import compute_elastic_config
>>> section = {"enabled": True, "max_train_batch_size": 4, "micro_batch_sizes": [1, 2, 3, 4], "version": 0.1}
>>> compute_elastic_config({"elasticity": {**section, "max_gpus": 4}}, "0.18.9", world_size=2)
(4, [1, 2, 4], 2)
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from ds_core.config.elastic import (
    ElasticityConfigError,
    ElasticityError,
    ElasticityIncompatibleWorldSize,
    check_elasticity,
    check_scheduler,
    elastic_sizes,
)
from ds_core.config.number_types import as_whole
from ds_core.config.problems import Problem, raise_problems, validate
from ds_core.config.section import show
from ds_core.config.sections.elasticity import VERSIONS, ElasticitySection
from ds_core.errors import ConfigError, NotBuiltError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ElasticityConfigError",
    "ElasticityError",
    "ElasticityIncompatibleWorldSize",
    "compute_elastic_config",
    "elasticity_enabled",
    "ensure_immutable_elastic_config",
]

OLDEST_TARGET = (0, 3, 8)


def elasticity_enabled(ds_config: Mapping[str, Any]) -> bool:
    """Return whether the section ``elasticity`` of a configuration is there and on.

    >>> [elasticity_enabled({"elasticity": {"enabled": word}}) for word in (True, "false")]
    [True, False]
    """
    return ElasticitySection.is_switched_on(ds_config.get("elasticity"))


def ensure_immutable_elastic_config(runtime_elastic_config_dict: Mapping[str, Any]) -> None:
    """Raise if a section ``elasticity`` differs from the one the scheduler set in ``DEEPSPEED_ELASTICITY_CONFIG``.

    Raises:
        ElasticityConfigError: the section is wrong, or its ``max_train_batch_size``, ``micro_batch_sizes`` or
            ``version`` is not the scheduler's.
    """
    section = _checked(runtime_elastic_config_dict)
    _raise(check_scheduler(section, os.environ), where="the environment")


def compute_elastic_config(
    ds_config: dict[str, Any], target_deepspeed_version: str, world_size: int = 0, return_microbatch: bool = False
) -> tuple[int, list[int]] | tuple[int, list[int], int]:
    """Return the elastic batch of a configuration.

    Args:
        ds_config: the whole configuration, with an enabled section ``elasticity``; left as it is.
        target_deepspeed_version: version of the runtime that will train, such as ``"0.18.9"``.
        world_size: GPUs of the job, not data-parallel ranks: these are ``world_size / model_parallel_size``. 0: not
            known, or what the environment's ``WORLD_SIZE`` says, where the number is needed: in version 0.2, and for
            ``return_microbatch``.
        return_microbatch: return the micro-batch even if ``world_size`` is 0.

    Returns:
        ``(train_batch_size, valid numbers of data-parallel ranks)``; with ``world_size`` or ``return_microbatch`` the
        micro-batch size is the third.

    Raises:
        ElasticityConfigError: the section is missing, off, wrong, or needs a number of GPUs that nobody gave.
        ElasticityIncompatibleWorldSize: the batch does not divide among the GPUs.
        ElasticityError: the target version is older than 0.3.8.
        NotBuiltError: there never was this ``version`` of the section.
    """
    section = _section_of(ds_config)
    _check_target(target_deepspeed_version)
    needs_gpus = section.version == 0.2 or return_microbatch
    gpus = _world_size(world_size) or (
        _world_size(os.environ.get("WORLD_SIZE") or 0, "WORLD_SIZE") if needs_gpus else 0
    )
    if needs_gpus and not gpus:
        raise ElasticityConfigError(
            "the number of GPUs is not known, and the batch depends on it",
            fix="pass world_size, or set the environment variable WORLD_SIZE",
        )
    _raise(check_elasticity(section), where="compute_elastic_config")
    _check_nodes(section, gpus)
    plan = elastic_sizes(section, gpus // section.model_parallel_size or None)
    if plan.micro is None or not (world_size or return_microbatch):
        return plan.train, list(plan.valid_dp_sizes)
    return plan.train, list(plan.valid_dp_sizes), plan.micro


def _section_of(ds_config: Any) -> ElasticitySection:
    if not isinstance(ds_config, dict):
        raise ElasticityConfigError(f"the configuration must be a dict, got {type(ds_config).__name__}")
    data = ds_config.get("elasticity")
    if data is None:
        raise ElasticityConfigError(
            "the configuration has no section elasticity", fix='add "elasticity": {"enabled": true, ...}'
        )
    version = data.get("version") if isinstance(data, dict) else None
    if isinstance(version, (int, float)) and version not in VERSIONS and version < max(VERSIONS):
        raise NotBuiltError(f"elasticity.version: got {version}, allowed are 0.1 and 0.2", fix="set it to 0.2")
    section = _checked(data)
    if not section.enabled:
        raise ElasticityConfigError("elasticity.enabled: got false", fix="set it to true")
    return section


def _checked(data: Any) -> ElasticitySection:
    section, problems = validate(ElasticitySection, data, path=("elasticity",))
    _raise(problems, where="section elasticity")
    assert section is not None, "a section without problems is there"
    return section


def _raise(problems: list[Problem], *, where: str) -> None:
    try:
        raise_problems(problems, where=where)
    except ConfigError as error:
        raise ElasticityConfigError(error.what, where=error.where, fix=error.fix) from None


def _check_target(version: str) -> None:
    numbers = re.match(r"v?(\d{1,9})(?:\.(\d{1,9}))?(?:\.(\d{1,9}))?", str(version))
    if not numbers or tuple(int(part or 0) for part in numbers.groups()) < OLDEST_TARGET:
        raise ElasticityError(
            f"target_deepspeed_version: got {show(version)}, elasticity needs 0.3.8 or later",
            fix="pass the version of the runtime that will train",
        )


def _world_size(value: Any, name: str = "world_size") -> int:
    number = as_whole(value)
    if number is None or number < 0:
        raise ElasticityConfigError(f"{name}: got {show(value)}, must be a whole number from 0", fix="pass GPUs, or 0")
    return number


def _check_nodes(section: ElasticitySection, gpus: int) -> None:
    """Raise if ``gpus`` are not whole nodes, in GPUs: dividing first by the model's parallel size would hide it."""
    node = section.num_gpus_per_node
    if section.version == 0.2 and gpus % node:
        near = [size for size in (gpus - gpus % node, gpus - gpus % node + node) if size and _fits(section, size)]
        raise ElasticityIncompatibleWorldSize(
            f"elasticity: {gpus} GPUs are not whole nodes of {node} (num_gpus_per_node)",
            fix=f"run on {' or '.join(map(str, near))} GPUs" if near else None,
        )


def _fits(section: ElasticitySection, gpus: int) -> bool:
    try:
        elastic_sizes(section, gpus // section.model_parallel_size)
    except ElasticityError:
        return False
    return True
