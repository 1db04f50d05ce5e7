"""Reset what a process has only one of; docs/design/globals.md lists it all, with the reason."""

from __future__ import annotations

import sys

__all__ = ["reset_globals"]


def reset_globals() -> None:
    """Bring every process-wide state of the ds packages back to how it is after a fresh import.

    A module that was never imported is not imported for this. Call it between tests that touch such state; it is
    not collective, so ranks must have finished with the process group.
    """
    if (watch := sys.modules.get("ds_core.comm.watch")) is not None:
        watch._tap.clear()
    # Then the group goes: what made it may ask the accelerator for a device while it is taken down.
    if (comm := sys.modules.get("ds_core.comm")) is not None and comm.is_initialized():
        comm.destroy_process_group()
    if (dist := sys.modules.get("torch.distributed")) is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    if (flight := sys.modules.get("ds_core.checkpoint.flight")) is not None:
        flight.forget()
    if (settings := sys.modules.get("ds_activation.settings")) is not None:
        settings.forget()
    if (rng := sys.modules.get("ds_activation.rng")) is not None:
        rng.get_cuda_rng_tracker().reset()
    if (accelerator := sys.modules.get("ds_core.accelerator")) is not None:
        accelerator.set_accelerator(None)
    if (registry := sys.modules.get("ds_core.registry")) is not None:
        registry.refresh()
    if (log := sys.modules.get("ds_core.log")) is not None:
        log.reset()
