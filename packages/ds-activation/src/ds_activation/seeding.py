"""Random numbers of a rank of the model-parallel group: the same in one state, its own in the other."""

from __future__ import annotations

from ds_activation import settings
from ds_activation.model_parallel import tp_rank_in
from ds_activation.rng import MODEL_PARALLEL, get_cuda_rng_tracker, seed_device
from ds_core.errors import EngineError
from ds_core.log import logger

__all__ = ["model_parallel_cuda_manual_seed", "model_parallel_reconfigure_tp_seed"]

APART = 2718
"""Between the seed that all have and that of rank 0's own state."""


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed the device with ``seed``, and the tracker's model-parallel state with one that differs by rank.

    Layers that are divided draw under ``get_cuda_rng_tracker().fork()``. States added before are gone.

    Raises:
        EngineError: on every rank, where no mpu is configured.
    """
    mpu = settings.current().mpu
    if mpu is None:
        raise EngineError(
            "which random numbers a rank has depends on its place in the model-parallel group, and no mpu is known",
            where=f"model_parallel_cuda_manual_seed({seed})",
            fix="call checkpointing.configure(mpu) first, with the mpu; without one, torch.manual_seed(seed) is enough",
        )
    rank = tp_rank_in(mpu)
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    seed_device(seed)
    tracker.add(MODEL_PARALLEL, seed + APART + rank)
    logger.debug("model-parallel rank %d: seed %d, its own %d", rank, seed, seed + APART + rank)


def model_parallel_reconfigure_tp_seed(seed: int) -> None:
    """Let the tracker's model-parallel state begin anew, at ``seed`` and the rank.

    Raises:
        EngineError: there is no such state.
    """
    get_cuda_rng_tracker().reseed(MODEL_PARALLEL, seed + APART + tp_rank_in(settings.current().mpu))
