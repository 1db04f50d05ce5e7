"""Communication: torch.distributed under DeepSpeed's names. NCCL and gloo are the only transports.

Loads torch on first use of a name that needs it.
"""

from __future__ import annotations

from typing import Any

from ds_core.comm.groups import (
    barrier,
    destroy_at_exit,
    destroy_process_group,
    expected_world_size,
    get_local_rank,
    get_rank,
    get_world_size,
    init_distributed,
    is_initialized,
    leave_collectives_alone,
    wait_before_destroy,
)
from ds_core.comm.together import all_or_none, broadcast_tensors, raise_together, same_on_all_ranks, values_of_ranks
from ds_core.comm.watch import Collective, CollectiveWatch, Traffic

__all__ = [
    "Collective",
    "CollectiveWatch",
    "Traffic",
    "all_or_none",
    "barrier",
    "broadcast_tensors",
    "destroy_at_exit",
    "destroy_process_group",
    "expected_world_size",
    "get_local_rank",
    "get_rank",
    "get_world_size",
    "init_distributed",
    "is_initialized",
    "leave_collectives_alone",
    "raise_together",
    "same_on_all_ranks",
    "values_of_ranks",
    "wait_before_destroy",
]

_TORCH = frozenset(
    (
        *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single"),
        *("broadcast", "broadcast_object_list", "gather", "irecv", "is_available", "isend", "monitored_barrier"),
        *("new_group", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send", "ReduceOp"),
    )
)
"""Names that are torch.distributed's own."""


def __getattr__(name: str) -> Any:
    if name not in _TORCH:
        raise AttributeError(f"module 'ds_core.comm' has no attribute {name!r}")
    import torch.distributed

    return getattr(torch.distributed, name)
