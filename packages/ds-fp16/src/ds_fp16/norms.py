"""Norms of gradients and weights, and clipping by them, for scripts with a loop of their own.

An engine does all of this itself. Names and signatures are those of DeepSpeed's ``runtime.utils``.

Note: which ranks must call
    With ``mpu``, an object of Megatron's kind, a function is collective over the model-parallel group, with an expert
    group over that one too. An mpu is asked for ``get_tensor_model_parallel_{rank,world_size,group}``, else
    ``get_slice_parallel_*``, else ``get_model_parallel_*``. Without, nothing is sent but where a function says so.

Note: range and precision
    Norms are fp64. The L2 norm comes from the op ``sum_of_squares``, which adds short rows in fp32; where that
    overflows it is taken again in fp64, so a finite fp16, bf16 or fp32 tensor always has a finite L2 norm. Of other
    norms the p-th powers of the elements must be in the range of fp64. -1 stands for "inf or NaN among the elements",
    as in DeepSpeed. All of these functions wait for the device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ds_core.errors import EngineError, NotBuiltError
from ds_fp16._groups import counted_once, data_group, expert_group, is_model_parallel_parameter, model_groups
from ds_fp16._powers import as_list, clip_by, device_of, is_norm, norm_over
from ds_fp16.overflow_check import CheckOverflow

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

__all__ = [
    "CheckOverflow",
    "DummyOptim",
    "clip_grad_norm_",
    "clip_tensors_by_global_norm",
    "get_flattened_grad_norm",
    "get_global_norm",
    "get_global_norm_of_tensors",
    "get_grad_zeros",
    "get_norm_with_moe_layers",
    "get_weight_norm",
    "is_model_parallel_parameter",
]

OVERFLOW = -1.0
"""What stands for a norm where an element is inf or NaN."""


def get_global_norm(norm_list: Iterable[float | Tensor]) -> float:
    """Return the L2 norm of a whole from the norms of its parts; -1 if one of them is -1.

    >>> get_global_norm([3.0, 4.0])
    5.0
    """
    norms = [float(norm) for norm in norm_list]
    return OVERFLOW if OVERFLOW in norms else math.hypot(*norms)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2, mpu: Any = None
) -> Tensor:
    """Scale the gradients of ``parameters`` in place, so that their norm is at most ``max_norm``.

    Without a process group this is ``torch.nn.utils.clip_grad_norm_``. With one, all ranks must call: the norm is
    averaged over the data-parallel group, so that ranks whose gradients are not reduced yet clip alike. That group is
    ``mpu.get_data_parallel_group()``, or all ranks without mpu; an mpu that has no such method averages nothing.

    Args:
        parameters: those without a gradient are passed over. With mpu, one that is on every model-parallel rank counts
            on the first alone.
        max_norm: 0 or more. Gradients are multiplied by ``max_norm / (norm + 1e-6)`` where that is below 1.
        norm_type: above 0, inf included.
        mpu: see the module.

    Returns:
        The norm before clipping, 0-d fp64. inf or NaN where a gradient is; the gradients become as in torch then.
    """
    if not max_norm >= 0:
        raise EngineError(f"max_norm is {max_norm}", where="clip_grad_norm_", fix="0 or more; inf only measures")
    p = _power(norm_type, "clip_grad_norm_")
    params = [param for param in as_list(parameters) if param.grad is not None]
    counted = [param.grad for param in counted_once(params, mpu) if param.grad is not None]
    norm = norm_over(counted, p, model_groups(mpu))
    group, world_size = data_group(mpu)
    if world_size > 1:
        dist.all_reduce(norm, group=group)
        norm /= world_size
    clip_by([param.grad for param in params if param.grad is not None], float(norm), max_norm, eps=1e-6)
    return norm


@torch.no_grad()
def get_flattened_grad_norm(
    parameters: Tensor | Iterable[Tensor],
    norm_type: float = 2,
    mpu: Any = None,
    grad_norm_mask: Sequence[Tensor | Sequence[Sequence[int]]] | None = None,
) -> float:
    """Return the norm of the gradients of ``parameters`` over the model-parallel group; -1 if one is inf or NaN.

    Args:
        parameters: flat ones, mostly; those without a gradient are passed over.
        norm_type: above 0, inf included.
        mpu: see the module.
        grad_norm_mask: for each parameter the ranges ``[start, end)`` of its flattened gradient that do not count, such
            as what other model-parallel ranks hold too. They may overlap.
    """
    p = _power(norm_type, "get_flattened_grad_norm")
    params = as_list(parameters)
    if grad_norm_mask is not None and len(grad_norm_mask) != len(params):
        raise EngineError(
            f"grad_norm_mask is for {len(grad_norm_mask)} parameters, given are {len(params)}",
            where="get_flattened_grad_norm",
            fix="pass a list of ranges for each, [] where all of it counts",
        )
    counted: list[Tensor] = []
    for index, param in enumerate(params):
        if param.grad is None:
            continue
        if grad_norm_mask is None:
            counted.append(param.grad)
            continue
        flat = param.grad.reshape(-1)
        counted += [flat[start:end] for start, end in _outside(grad_norm_mask[index], flat.numel(), index)]
    return _number(norm_over(counted, p, model_groups(mpu)))


@torch.no_grad()
def get_weight_norm(parameters: Tensor | Iterable[Tensor], norm_type: float = 2, mpu: Any = None) -> float:
    """Return the norm of the values of ``parameters`` over the model-parallel group; -1 if one is inf or NaN.

    Left out are parameters with ``ds_pipe_replicated``, which another pipeline stage counts, and those that every
    model-parallel rank holds, but for the first rank.
    """
    p = _power(norm_type, "get_weight_norm")
    own = [param for param in as_list(parameters) if not getattr(param, "ds_pipe_replicated", False)]
    return _number(norm_over([param.detach() for param in counted_once(own, mpu)], p, model_groups(mpu)))


@torch.no_grad()
def get_grad_zeros(parameters: Tensor | Iterable[Tensor], mpu: Any = None) -> int:
    """Return how many elements of the gradients of ``parameters`` are zero, over the model-parallel group.

    Parameters are counted as by :func:`get_weight_norm`, those without a gradient not at all.
    """
    own = [param for param in as_list(parameters) if not getattr(param, "ds_pipe_replicated", False)]
    grads = [param.grad for param in counted_once(own, mpu) if param.grad is not None]
    zeros = torch.zeros((), dtype=torch.int64, device=device_of(grads))
    for grad in grads:
        zeros += (grad.numel() - grad.count_nonzero()).to(zeros.device)
    for group in model_groups(mpu):
        dist.all_reduce(zeros, group=group)
    return int(zeros)


@torch.no_grad()
def get_global_norm_of_tensors(
    input_tensors: Iterable[Tensor],
    norm_type: float = 2,
    mpu: Any = None,
    use_graph: bool = False,
    moe_ep_group: Any = None,
) -> Tensor:
    """Return the norm of ``input_tensors`` over the model-parallel and the expert-parallel group.

    Args:
        input_tensors: floating point, all of them count.
        norm_type: above 0, inf included.
        mpu: see the module.
        use_graph: not built.
        moe_ep_group: process group of the ranks that hold the other experts; None: there are none.

    Returns:
        0-d fp64; -1 if an element is inf or NaN, on every rank.
    """
    _no_graph(use_graph, "get_global_norm_of_tensors")
    groups = model_groups(mpu) + ([] if moe_ep_group is None else [moe_ep_group])
    p = _power(norm_type, "get_global_norm_of_tensors")
    norm = norm_over([tensor.detach() for tensor in input_tensors], p, groups)
    return torch.where(norm.isfinite(), norm, OVERFLOW)


@torch.no_grad()
def clip_tensors_by_global_norm(
    input_tensors: Iterable[Tensor],
    max_norm: float = 1.0,
    global_norm: float | Tensor | None = None,
    mpu: Any = None,
    eps: float = 1e-6,
    use_graph: bool = False,
) -> float | Tensor:
    """Scale ``input_tensors`` in place by ``max_norm / (norm + eps)`` where that is below 1, and return the norm.

    Args:
        input_tensors: floating point.
        max_norm: 0 or more.
        global_norm: where it is known; None: :func:`get_global_norm_of_tensors` says.
        mpu: for that; see the module.
        eps: keeps the quotient finite at a norm of 0.
        use_graph: not built.

    Returns:
        ``global_norm`` as given or found. Where it is -1, inf or NaN the tensors are not touched: there is an inf or
        NaN in them, and no factor that makes it better.
    """
    _no_graph(use_graph, "clip_tensors_by_global_norm")
    if not max_norm >= 0:
        raise EngineError(f"max_norm is {max_norm}", where="clip_tensors_by_global_norm", fix="0 or more")
    tensors = [tensor.detach() for tensor in input_tensors]
    found = get_global_norm_of_tensors(tensors, mpu=mpu) if global_norm is None else global_norm
    norm = float(found)
    if is_norm(norm):
        clip_by(tensors, norm, max_norm, eps=eps)
    return found


@torch.no_grad()
def get_norm_with_moe_layers(
    non_expert_norm: float | Tensor, mpu: Any, expert_tensors: Mapping[str, Iterable[Tensor]], norm_type: float = 2
) -> float:
    """Return the norm of everything from that of the replicated part and the tensors of experts; -1 if a part is -1.

    Args:
        non_expert_norm: of the rest, with the same ``norm_type``.
        mpu: see the module; in a job of several ranks with experts it also has ``get_expert_parallel_group(name)``.
        expert_tensors: name of the expert group -> this rank's tensors. All ranks have the same names in one order.
        norm_type: above 0, inf included.

    Raises:
        NotBuiltError: the ranks of an expert group are needed, and mpu does not know them.
    """
    p = _power(norm_type, "get_norm_with_moe_layers")
    norms = [float(non_expert_norm)]
    for name, tensors in expert_tensors.items():
        group = expert_group(mpu, name, "get_norm_with_moe_layers")
        norms.append(float(get_global_norm_of_tensors(tensors, p, mpu, moe_ep_group=group)))
    if not all(is_norm(norm) for norm in norms):
        return OVERFLOW
    return float(torch.linalg.vector_norm(torch.tensor(norms, dtype=torch.float64), p))


class DummyOptim:
    """Stands where an optimizer is asked for and there is none: it only has parameter groups."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(params)}]


def _power(norm_type: float, where: str) -> float:
    p = float(norm_type)
    if not p > 0:
        raise EngineError(f"norm_type is {norm_type}", where=where, fix="a number above 0, or inf")
    return p


def _no_graph(use_graph: bool, where: str) -> None:
    if use_graph:
        raise NotBuiltError(
            "use_graph=True (the operations captured in a device graph) is not built yet",
            where=where,
            fix="leave use_graph out",
        )


def _number(norm: Tensor) -> float:
    value = float(norm)
    return value if is_norm(value) else OVERFLOW


def _outside(ranges: Tensor | Sequence[Sequence[int]], numel: int, index: int) -> list[tuple[int, int]]:
    """Return the intervals of ``[0, numel)`` that no range covers."""
    given = ranges.reshape(-1, 2).tolist() if isinstance(ranges, torch.Tensor) else ranges
    pairs = sorted(tuple(pair) for pair in given)
    kept, begin = [], 0
    for pair in pairs:
        if len(pair) != 2 or not 0 <= pair[0] <= pair[1] <= numel:
            raise EngineError(
                f"{list(pair)} is no range of a gradient of {numel} elements",
                where=f"get_flattened_grad_norm, grad_norm_mask[{index}]",
                fix="write [start, end], the end not included",
            )
        if pair[0] > begin:
            kept.append((begin, pair[0]))
        begin = max(begin, pair[1])
    return [*kept, (begin, numel)] if begin < numel else kept
