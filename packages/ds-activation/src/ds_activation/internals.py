"""Parts of DeepSpeed's checkpointing that other projects import; :mod:`ds_activation.call` needs none of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds_activation import kept, settings
from ds_activation.call import checkpoint
from ds_activation.model_parallel import Place, place_in
from ds_core.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "CheckpointFunction",
    "detach_variable",
    "extract_tensors",
    "gather_partitioned_activations",
    "get_partition_size",
    "get_partition_start",
    "is_activation_to_checkpoint",
    "merge_tensors",
    "partition_activations",
]


class CheckpointFunction:
    """A checkpointed call under the name of DeepSpeed's autograd function; it is none."""

    @staticmethod
    def apply(run_function: Callable[..., Any], all_outputs: list[Any], *args: Any) -> Any:
        """Return what ``run_function(*args)`` returns, and append its outputs, one or several, to ``all_outputs``."""
        outputs = checkpoint(run_function, *args)
        all_outputs.extend(outputs if isinstance(outputs, (tuple, list)) else [outputs])
        return outputs


def detach_variable(inputs: tuple[Any, ...], device: torch.device | str | None = None) -> tuple[Any, ...]:
    """Return ``inputs`` with tensors detached, on ``device`` where it is given; each keeps its ``requires_grad``.

    Raises:
        RuntimeError: ``inputs`` is no tuple.
    """
    if not isinstance(inputs, tuple):
        raise EngineError(f"detach_variable takes a tuple, got a {type(inputs).__name__}", fix="pass tuple(inputs)")
    return tuple(_detached(value, device) if isinstance(value, Tensor) else value for value in inputs)


def _detached(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    detached = tensor.detach() if device is None else tensor.detach().to(device)
    return detached.requires_grad_(tensor.requires_grad)


def extract_tensors(all_objects: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Any], Sequence[bool]]:
    """Return the tensors of ``all_objects``, the others, and for each object whether it is a tensor.

    Three tuples for a tuple, three lists for a list.
    """
    flags = [isinstance(value, Tensor) for value in all_objects]
    tensors = [value for value in all_objects if isinstance(value, Tensor)]
    others = [value for value in all_objects if not isinstance(value, Tensor)]
    if isinstance(all_objects, tuple):
        return tuple(tensors), tuple(others), tuple(flags)
    return tensors, others, flags


def merge_tensors(
    tensor_objects: Sequence[Tensor], non_tensor_objects: Sequence[Any], tensor_flags: Sequence[bool]
) -> tuple[Any, ...]:
    """Return what :func:`extract_tensors` took apart, in its order.

    Raises:
        EngineError: there are more or fewer objects than flags.
    """
    tensors, others = len(tensor_objects), len(non_tensor_objects)
    if (tensors, others) != (sum(tensor_flags), len(tensor_flags) - sum(tensor_flags)):
        raise EngineError(
            f"{tensors} tensors and {others} others do not fit {sum(tensor_flags)} flags that say tensor and "
            f"{len(tensor_flags) - sum(tensor_flags)} that do not",
            where="merge_tensors",
            fix="pass the three that extract_tensors returned",
        )
    of_tensors, of_others = iter(tensor_objects), iter(non_tensor_objects)
    return tuple(next(of_tensors) if is_tensor else next(of_others) for is_tensor in tensor_flags)


def _place() -> Place:
    return place_in(settings.current().mpu)


def is_activation_to_checkpoint(item: Any) -> bool:
    """Return whether ``item`` is a tensor that is divided or moved: of floating point, with an element per rank."""
    return kept.is_activation(item, _place().size)


def get_partition_size(item: Tensor) -> int:
    """Return the elements of each rank's slice of ``item``; the last slices may be padded."""
    return kept.segment_numel(item.numel(), _place().size)


def get_partition_start(item: Tensor) -> int:
    """Return the element of ``item``, flat, at which this rank's slice begins."""
    return get_partition_size(item) * _place().rank


def partition_activations(
    args: Sequence[Any], cpu_checkpoint: bool = False, contiguous_checkpoint: bool = False
) -> list[Any]:
    """Return ``args`` with this rank's slice, flat, in place of each tensor that is divided.

    Args:
        args: left as they are.
        cpu_checkpoint: have the slices on the host.
        contiguous_checkpoint: changes nothing: the slices are new memory; buffers are lent to checkpointed calls alone.
    """
    place = _place()
    divided: list[Any] = []
    for value in args:
        if kept.is_activation(value, place.size):
            slice_ = kept.part(value.detach().reshape(-1), place).clone()
            divided.append(slice_.cpu() if cpu_checkpoint else slice_)
        else:
            divided.append(value)
    return divided


def gather_partitioned_activations(tensors: Sequence[Any], device: torch.device | str | None = None) -> tuple[Any, ...]:
    """Return what slices are of; all ranks of the model-parallel group must call it.

    Args:
        tensors: pairs, one after another: a slice and the sizes of the whole (a tensor of integers or a sequence); or
            anything, and None, to have it back.
        device: where the whole is to be; None: where the slice is.

    Raises:
        EngineError: their number is odd, or a slice does not fit.
    """
    if len(tensors) % 2:
        raise EngineError(
            f"{len(tensors)} values are no pairs of a slice and its sizes",
            where="gather_partitioned_activations",
            fix="pass slice, sizes, slice, sizes, ...; None as the sizes of what was not divided",
        )
    return tuple(_whole(item, sizes, device) for item, sizes in zip(tensors[::2], tensors[1::2], strict=True))


def _whole(item: Any, sizes: Any, device: torch.device | str | None) -> Any:
    if sizes is None or not isinstance(item, Tensor):
        return item
    size = torch.Size(sizes.tolist() if isinstance(sizes, Tensor) else sizes)
    moved = item.detach() if device is None else item.detach().to(device)
    place = _place()
    if moved.numel() != kept.segment_numel(size.numel(), place.size):
        raise EngineError(
            f"a slice of {moved.numel()} elements is not that of {tuple(size)} on one of {place.size} ranks",
            where="gather_partitioned_activations",
            fix="pass what partition_activations returned, with the sizes of the tensor it was made of",
        )
    return kept.gather(moved, place)[: size.numel()].view(size).requires_grad_(item.requires_grad)
