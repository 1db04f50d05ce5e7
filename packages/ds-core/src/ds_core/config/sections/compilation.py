"""Section ``compile``: DeepCompile, which plans collectives and offload inside a compiled graph."""

from __future__ import annotations

from typing import Literal

from ds_core.config.section import Count, Section, key

__all__ = ["CompileSection"]


class CompileSection(Section):
    """DeepCompile: graph passes of ``engine.compile()`` in place of hooks (ZeRO stages 1 to 3)."""

    source = "spec/core.md 2.17"
    comes_with = "ds-core"

    deepcompile: bool = False
    """Run the passes; every other key is for them."""
    free_activation: bool = False
    """Free activations in backward as soon as they were used last."""
    free_activation_threshold_bytes: Count = key("free_activation_threshold", default=10 * 1024 * 1024)
    """Bytes from which on an activation is freed so."""
    offload_activation: bool = False
    """Keep activations in CPU memory between forward and backward."""
    offload_activation_pin_memory: bool = True
    """Page-locked CPU memory for them: faster copies, more memory."""
    offload_opt_states: bool = False
    """Keep optimizer state in CPU memory while it is not needed."""
    double_buffer: bool = True
    """Use two buffers in turn, so that filling one overlaps with the collective of the other."""
    symmetric_memory: bool = False
    """Gather parameters through torch's symmetric memory."""
    debug_log: bool = False
    """Log what the passes do."""
    offload_parameters: bool = False
    """Keep parameters in CPU memory between their uses."""
    sync_before_reduce: bool = False
    """Wait for the device before each reduction of gradients."""
    sync_after_reduce: bool = False
    """Wait for the device after each reduction of gradients."""
    sync_before_allgather: bool = False
    """Wait for the device before parameters are gathered."""
    sync_after_allgather: bool = False
    """Wait for the device after parameters were gathered."""
    keep_int_input_tensors: bool = True
    """Keep integer inputs of the graph alive until its end."""
    keep_all_input_tensors: bool = False
    """Keep all inputs of the graph alive until its end."""
    passes: tuple[Literal["z1", "z3", "autosp", "autotp"], ...] | None = None
    """Passes to run; null leaves the choice to DeepCompile."""

    def is_on(self) -> bool:
        """Return whether the passes are asked for; without them the other keys mean nothing."""
        return self.deepcompile or bool(self.passes)
