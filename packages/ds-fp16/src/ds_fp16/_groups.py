"""Which ranks share what: an mpu's model-parallel, data-parallel and expert groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ds_core.errors import CommError, NotBuiltError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

__all__ = [
    "all_ranks",
    "any_rank",
    "counted_once",
    "data_group",
    "expert_group",
    "expert_names",
    "is_model_parallel_parameter",
    "model_groups",
]


def is_model_parallel_parameter(p: Tensor) -> bool:
    """Return whether ``p`` is one rank's part of a parameter: has ``model_parallel`` or ``tensor_model_parallel``."""
    return bool(getattr(p, "model_parallel", False) or getattr(p, "tensor_model_parallel", False))


def counted_once(params: Sequence[Tensor], mpu: Any) -> list[Tensor]:
    """Return the parameters this rank counts: what every model-parallel rank holds counts on the first alone."""
    if mpu is None or _model_parallel(mpu, "rank") == 0:
        return list(params)
    return [param for param in params if is_model_parallel_parameter(param)]


def model_groups(mpu: Any) -> list[Any]:
    """Return the model-parallel group, none where it is this rank alone: an mpu may have no group then."""
    return [] if mpu is None or _model_parallel(mpu, "world_size") == 1 else [_model_parallel(mpu, "group")]


def data_group(mpu: Any) -> tuple[Any, int]:
    """Return the data-parallel group and its size, 1 where there is none to ask."""
    if not dist.is_initialized() or (mpu is not None and not hasattr(mpu, "get_data_parallel_group")):
        return None, 1
    group = dist.group.WORLD if mpu is None else mpu.get_data_parallel_group()
    return group, dist.get_world_size(group)


def all_ranks() -> list[Any]:
    """Return the group of all ranks, none in a job of one."""
    return [dist.group.WORLD] if dist.is_initialized() and dist.get_world_size() > 1 else []


def any_rank(flag: bool, groups: Sequence[Any], device: torch.device) -> bool:
    """Return whether ``flag`` is true on a rank of ``groups``; the collective's number is on ``device``."""
    if not groups:
        return flag
    found = torch.tensor(float(flag), device=device)
    for group in groups:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return bool(found)


def expert_names(params: Iterable[Tensor]) -> list[str]:
    """Return the names of the groups that experts among ``params`` belong to, in an order all ranks share."""
    return sorted({str(getattr(param, "group_name", "")) for param in params if not getattr(param, "allreduce", True)})


def expert_group(mpu: Any, name: str, where: str) -> Any:
    """Return the process group of the experts called ``name``, None in a job of one rank."""
    if hasattr(mpu, "get_expert_parallel_group"):
        return mpu.get_expert_parallel_group(name)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    raise NotBuiltError(
        f"finding the ranks of the expert group {name!r} is not built yet",
        where=where,
        fix="pass an mpu with a method get_expert_parallel_group(name)",
    )


def _model_parallel(mpu: Any, what: str) -> Any:
    names = [f"get_{kind}_{what}" for kind in ("tensor_model_parallel", "slice_parallel", "model_parallel")]
    for name in names:
        if hasattr(mpu, name):
            return getattr(mpu, name)()
    raise CommError(
        f"mpu, a {type(mpu).__name__}, does not know the model-parallel {what}",
        where="mpu",
        fix=f"give it one of the methods {', '.join(names)}",
    )
