"""Section ``activation_checkpointing``: what is computed again in backward, and how its inputs are kept until then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from ds_core.config.section import Count, NoEffect, PositiveInt, Section
from ds_core.config.sections.techniques import Names

if TYPE_CHECKING:
    from ds_core.config.config import Config

__all__ = ["ActivationCheckpointingSection"]


def _nobody_reads_flags(config: Any) -> bool:
    from ds_core import registry  # slow to import; it reads names, and imports no plugin

    return "deepspeed" not in registry.names("activation")


def _section(config: Config) -> Section | None:
    return config.sections.get("activation_checkpointing")


def _is_not(*policies: str) -> NoEffect:
    """Mark a key that only ``policies`` read."""

    def holds(config: Config) -> bool:
        return getattr(_section(config), "policy", None) not in policies

    return NoEffect(f"only policy {' or '.join(map(repr, policies))} reads it".replace("'", '"'), when=holds)


OF_CALLS = NoEffect(
    "it is about calls of checkpointing.checkpoint and modules that policy chooses, carried out by ds-activation, "
    "which is not installed",
    when=_nobody_reads_flags,
)

OF_BUFFERS = NoEffect(
    "only contiguous_memory_optimization reads it",
    when=lambda config: not getattr(_section(config), "contiguous_memory_optimization", False),
)


class ActivationCheckpointingSection(Section):
    """What a forward does not keep for backward: which modules, and how the inputs of checkpointed calls are kept.

    Without ``policy`` it is about calls that the model itself wraps in ``checkpointing.checkpoint``.
    """

    source = "spec/core.md 2.9, spec/activation-checkpointing.md 1"

    policy: Literal["full", "every_n", "selective", "auto"] | None = None
    """Which modules of an unmodified model are computed again in backward: all blocks; every ``interval``-th; all, but
    for matrix products and attention, whose results are kept; or those that keep saved activations within
    ``memory_budget`` at the least extra time, by a profile of the first forward. Null: none. Needs ds-activation."""
    modules: Annotated[Names, _is_not("full", "every_n", "selective", "auto")] = ()
    """Names or class names of the blocks, or patterns of them such as ``transformer.h.*``; without any, the repeated
    blocks of the model."""
    interval: Annotated[PositiveInt, _is_not("every_n")] = 2
    """Of so many blocks one is computed again."""
    memory_budget: Annotated[PositiveInt | None, _is_not("auto")] = None
    """Bytes of saved activations that ``auto`` may keep."""
    partition_activations: Annotated[bool, OF_CALLS] = False
    """Divide saved inputs among the model-parallel ranks, those of the ``mpu`` given to ``checkpointing.configure``."""
    cpu_checkpointing: Annotated[bool, OF_CALLS] = False
    """Keep saved inputs in CPU memory."""
    contiguous_memory_optimization: Annotated[bool, OF_CALLS] = False
    """Copy divided inputs into buffers made beforehand; needs ``partition_activations`` and ``number_checkpoints``."""
    number_checkpoints: Annotated[Count | None, OF_CALLS, OF_BUFFERS] = None
    """Checkpointed calls in one forward, which is the number of those buffers."""
    synchronize_checkpoint_boundary: Annotated[bool, OF_CALLS] = False
    """Wait for the device at the start and the end of every checkpointed forward and backward."""
    profile: Annotated[bool, OF_CALLS] = False
    """Log the time of forward and backward of every checkpointed call."""
