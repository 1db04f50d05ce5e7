"""A safetensors writer that streams, into a file that is whole or absent.

The safetensors library's own writer wants every tensor in host memory at once; this one holds a single one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from ds_core.checkpoint.atomic import written_beside
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

__all__ = ["write_safetensors"]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""torch dtype -> the word of the safetensors format."""


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

    Reference:
        https://github.com/huggingface/safetensors#format
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in tensors:
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"dtype {tensor.dtype} cannot be stored in a safetensors file",
                where=f"tensor {name!r}",
                fix=f"one of {', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)}",
            )
        if name in header:
            raise CheckpointError(f"two tensors of one file are called {name!r}", where=str(path), fix="rename one")
        end = at + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8, so that readers can map them
    with written_beside(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in tensors:
            file.write(_bytes_of(tensor))
    return 8 + len(text) + at


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
