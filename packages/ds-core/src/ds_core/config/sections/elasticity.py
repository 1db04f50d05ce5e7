"""Section ``elasticity``: one batch size that fits many numbers of GPUs. The arithmetic is in ``config/elastic.py``."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from ds_core.config.section import NeededWhenOn, NoEffect, Number, PositiveInt, Section, key

__all__ = ["VERSIONS", "ElasticitySection"]

VERSIONS = (0.1, 0.2)
LARGEST_BATCH = 2**31 - 1
MOST_SIZES = 100


def _few(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if not 1 <= len(sizes) <= MOST_SIZES:
        raise PydanticCustomError("sizes", "must be a list of 1 to {most} whole numbers", {"most": MOST_SIZES})
    return sizes


def _known_version(version: float) -> float:
    if version not in VERSIONS:
        raise PydanticCustomError("version", "allowed are 0.1 and 0.2")
    return version


class ElasticitySection(Section):
    """One batch size that fits many numbers of GPUs, so that a job may go on with more or fewer of them.

    While it is on it sets the three batch sizes. Rules across its keys are checked in ``config/elastic.py``.
    """

    source: ClassVar[str] = "spec/core.md 2.19, spec/launcher.md 9"

    enabled: bool = False
    """Choose the three batch sizes from this section instead of reading them."""
    max_train_batch_size: Annotated[PositiveInt, Field(le=LARGEST_BATCH), NeededWhenOn()] = 2000
    """Most samples of one optimizer step, over all ranks. Required while the section is on."""
    micro_batch_sizes: Annotated[tuple[PositiveInt, ...], AfterValidator(_few), NeededWhenOn()] = (2, 4, 6)
    """Samples of one forward on one rank: the sizes to choose from. Required while the section is on."""
    min_gpus: PositiveInt = 1
    """Fewest GPUs to find a batch size for; version 0.2 rounds down to whole nodes."""
    max_gpus: PositiveInt = 10000
    """Most GPUs to find a batch size for; version 0.2 rounds down to whole nodes."""
    min_time: Annotated[Number, Field(ge=0), NoEffect("it is for a scheduler; no batch size depends on it")] = 0.0
    """Minutes that a job should run before it is given other GPUs."""
    prefer_larger_batch: bool = key("prefer_larger_batch", "prefer_large_batch", default=True)
    """Of two batch sizes that fit equally many numbers of GPUs take the larger; false: the smaller."""
    ignore_non_elastic_batch_info: bool = False
    """Allow the three batch sizes to be given too; those found here replace them."""
    version: Annotated[Number, AfterValidator(_known_version)] = 0.2
    """Which arithmetic: 0.1 counts GPUs one by one, 0.2 counts whole nodes and knows model parallelism."""
    num_gpus_per_node: PositiveInt = 1
    """GPUs of one node, all of which belong to the job; read by version 0.2."""
    model_parallel_size: PositiveInt = 1
    """GPUs that share one replica of the model; more than 1 needs version 0.2."""
