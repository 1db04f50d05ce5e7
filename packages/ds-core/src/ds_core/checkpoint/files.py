"""Files of tensors that are whole or absent, written through host memory one tensor at a time.

The safetensors library's own writer wants every tensor in host memory at once; this one holds a single one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ds_core.checkpoint.atomic import written_beside
from ds_core.checkpoint.safetensors_format import Entry, write_stream

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

__all__ = ["bytes_of", "write_safetensors", "write_torch_file"]


def write_safetensors(path: Path, tensors: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str]) -> int:
    """Write ``tensors`` to ``path``, one at a time through host memory; durable under its name on return.

    Args:
        path: written as ``path.tmp`` beside, then renamed.
        tensors: (name, tensor), any device and strides. Wider dtypes should come first, so that all are aligned.
        metadata: strings for the header.

    Returns:
        The size of the file in bytes.

    Raises:
        CheckpointError: a dtype the format does not have, or two tensors of one name.
        OSError: the disk is full, the folder is read-only, ...; the partial file is removed.
    """
    entries = [Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors]
    waiting = iter(tensors)
    return write_stream(path, entries, metadata, lambda _: [bytes_of(next(waiting)[1])])


def write_torch_file(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write what ``torch.load`` reads; names of one tensor share its storage there too. Durable on return.

    Args:
        path: written as ``path.tmp`` beside, then renamed.
        tensors: by name. A view is stored without the rest of its storage.
    """
    copies: dict[int, Tensor] = {}
    content = dict(tensors)
    for name, value in tensors.items():
        # torch.save stores all of a view's storage, in every file that has one of its views.
        if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() != value.nbytes:
            if id(value) not in copies:
                copies[id(value)] = value.clone()
            content[name] = copies[id(value)]
    with written_beside(path) as file:
        torch.save(content, file)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the elements of ``tensor``, row by row, as bytes; no copy where it lies in host memory like that."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
