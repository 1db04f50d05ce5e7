"""Section ``activation_checkpointing``: what is kept of a forward whose activations are computed again in backward."""

from __future__ import annotations

from ds_core.config.section import Count, Section

__all__ = ["ActivationCheckpointingSection"]


class ActivationCheckpointingSection(Section):
    """How inputs of checkpointed calls are kept; the section alone checkpoints nothing."""

    source = "spec/core.md 2.9, spec/activation-checkpointing.md 1"
    no_effect = (
        "it takes effect only through checkpointing.configure(deepspeed_config=...), "
        "and only for calls that the model wraps in checkpointing.checkpoint"
    )

    partition_activations: bool = False
    """Divide saved inputs among the model-parallel ranks."""
    cpu_checkpointing: bool = False
    """Keep saved inputs in CPU memory."""
    contiguous_memory_optimization: bool = False
    """Copy divided inputs into buffers made beforehand; needs ``partition_activations`` and ``number_checkpoints``."""
    number_checkpoints: Count | None = None
    """Checkpointed calls in one forward, which is the number of those buffers."""
    synchronize_checkpoint_boundary: bool = False
    """Wait for the device at the start and the end of every checkpointed forward and backward."""
    profile: bool = False
    """Log the time of forward and backward of every checkpointed call."""
