"""Agreement between ranks: one fails, all fail with its reason; what must be equal is compared or made so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from ds_core.errors import CommError, DsError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

__all__ = ["all_or_none", "broadcast_tensors", "raise_together", "same_on_all_ranks", "values_of_ranks"]

_T = TypeVar("_T")

BROADCAST_BYTES = 25 * 2**20
"""Small tensors travel together in messages of about this size."""


def raise_together(error: Exception | None, group: ProcessGroup | None) -> None:
    """Raise on every rank if any rank has an error; a rank's own error is raised as it is. Collective.

    Args:
        error: what went wrong on this rank, or None.
        group: the ranks that agree; None: this process alone.

    Raises:
        DsError: of the class of the first failing rank's error where that is a DsError, naming the rank.
        CommError: a rank is gone; where this rank has an error of its own, that one is raised.
    """
    if group is None:
        if error is not None:
            raise error
        return
    import torch.distributed as dist

    if dist.get_world_size(group) > 1:
        try:
            told: list[DsError | None] = values_of_ranks(_portable(error), group)
        except CommError:
            if error is not None:
                raise error from None
            raise
        if error is None:
            for rank, theirs in enumerate(told):
                if theirs is not None:
                    raise type(theirs)(f"rank {rank} failed: {theirs.what}", where=theirs.where, fix=theirs.fix)
    if error is not None:
        raise error


def all_or_none(work: Callable[[], _T], group: ProcessGroup | None) -> _T:
    """Do what only this rank does; return its result once every rank's has succeeded. Collective.

    Raises:
        DsError: as :func:`raise_together`, which gets whatever ``work`` raises.
    """
    failure: Exception | None = None
    done: list[_T] = []
    try:
        done.append(work())
    except Exception as error:
        failure = error
    raise_together(failure, group)
    return done[0]


def values_of_ranks(value: Any, group: ProcessGroup | None) -> list[Any]:
    """Return what every rank gives, in their order. Collective.

    Raises:
        CommError: a rank is gone.
    """
    if group is None:
        return [value]
    import torch.distributed as dist

    if dist.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(values, value, group=group)
    except RuntimeError as error:
        raise CommError(
            f"the ranks cannot reach each other, one of them is gone: {error}", fix="see why that rank ended"
        ) from error
    return values


def _portable(error: Exception | None) -> DsError | None:
    if error is None or isinstance(error, DsError):
        return error
    return CommError(f"{type(error).__name__}: {error}")


def same_on_all_ranks(value: Any, group: ProcessGroup | None) -> dict[int, Any]:
    """Return the ranks whose ``value`` differs from rank 0's, with theirs; empty when all agree. Collective.

    Raises:
        CommError: a rank is gone.
    """
    if group is None:
        return {}
    import torch.distributed as dist

    if dist.get_world_size(group) == 1:
        return {}
    values = values_of_ranks(value, group)
    return {rank: theirs for rank, theirs in enumerate(values) if theirs != values[0]}


def broadcast_tensors(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """Copy rank 0's values of ``tensors`` into every rank's, in place. Collective; blocks.

    All ranks pass tensors of equal shapes and dtypes in equal order. Needs about 25 MB beside them.
    """
    import torch
    import torch.distributed as dist

    if dist.get_world_size(group) == 1:
        return
    pending: list[Tensor] = []
    size = 0

    def send() -> None:
        nonlocal pending, size
        if len(pending) == 1 and pending[0].is_contiguous():
            dist.broadcast(_as_bytes(pending[0]), group=group, group_src=0)
        elif pending:
            flat = torch.cat([tensor.reshape(-1) for tensor in pending])
            dist.broadcast(_as_bytes(flat), group=group, group_src=0)
            for tensor, part in zip(pending, flat.split([tensor.numel() for tensor in pending]), strict=True):
                tensor.copy_(part.view_as(tensor))
        pending, size = [], 0

    with torch.no_grad():
        for tensor in tensors:
            if tensor.numel() == 0:
                continue
            if pending and (
                pending[0].dtype != tensor.dtype
                or pending[0].device != tensor.device
                or size + tensor.nbytes > BROADCAST_BYTES
            ):
                send()
            pending.append(tensor.detach())
            size += tensor.nbytes
        send()


def _as_bytes(tensor: Tensor) -> Tensor:
    # gloo knows no 16-bit integers, no fp8 and more; bytes are bytes.
    import torch

    return tensor.view(-1).view(torch.uint8)
