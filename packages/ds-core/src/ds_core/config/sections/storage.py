"""Sections of storage: ``aio`` for files of offloaded state, ``nebula`` and ``datastates_ckpt`` for checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict

from ds_core.config.section import NoEffect, PositiveInt, Section, key

if TYPE_CHECKING:
    from ds_core.config.config import Config

__all__ = ["AioSection", "DatastatesSection", "NebulaSection"]


def _keeps_nothing_in_files(config: Config) -> bool:
    zero = config.zero_optimization
    offloads = (zero.offload_optimizer, zero.offload_param)
    return zero.stage == 0 or not any(offload is not None and offload.device == "nvme" for offload in offloads)


OF_FILES = NoEffect("nothing is offloaded to files", when=_keeps_nothing_in_files)


class AioSection(Section):
    """How files of offloaded state are read and written (``zero_optimization.offload_*.device: "nvme"``)."""

    source = "spec/core.md 2.23"

    block_bytes: Annotated[PositiveInt, OF_FILES] = key("block_size", default=1024 * 1024)
    """Bytes of one request to the file system."""
    queue_depth: Annotated[PositiveInt, OF_FILES] = 8
    """Requests under way at one time, per thread."""
    intra_op_parallelism: Annotated[PositiveInt, OF_FILES] = key(
        "intra_op_parallelism", "thread_count", "num_threads", default=1
    )
    """Threads that share one read or write. DeepSpeed ignores ``thread_count``, which its older documents say, and
    ``num_threads``, which ``ds_nvme_tune`` prints."""
    single_submit: Annotated[bool, OF_FILES] = False
    """Hand requests over one by one instead of ``queue_depth`` at once."""
    overlap_events: Annotated[bool, OF_FILES] = True
    """Hand new requests over while earlier ones finish."""
    use_gds: Annotated[bool, OF_FILES] = False
    """Move data between files and GPU memory directly (GPUDirect Storage; CUDA only)."""


class NebulaSection(Section):
    """Checkpoints through the Nebula service of Azure."""

    source = "spec/core.md 2.23, spec/checkpoint.md 13.1"
    comes_with = "ds-ckpt"

    enabled: bool = False
    """Save through Nebula."""
    persistent_storage_path: str | None = None
    """Folder that checkpoints end up in."""
    persistent_time_interval: PositiveInt = 100
    """Seconds between two checkpoints that reach that folder."""
    num_of_version_in_retention: PositiveInt = 2
    """Checkpoints that are kept; older ones are deleted."""
    enable_nebula_load: bool = True
    """Load through Nebula too."""
    nebula_load_path: str | None = None
    """Folder to load from; null is ``persistent_storage_path``."""


class DatastatesSection(Section):
    """Checkpoints through the package ``datastates``: the section turns it on, and all keys are handed to it.

    ``false`` in its place leaves it out.
    """

    model_config = ConfigDict(extra="allow")

    source = "spec/core.md 2.23, spec/checkpoint.md 13.1"
    comes_with = "ds-ckpt"

    def is_on(self) -> bool:
        """Return True: a section that is there, even an empty one, asks for it."""
        return True
