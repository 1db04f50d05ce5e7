"""DeepSpeed's ``zero_to_fp32`` functions, for checkpoints of any format, stage and number of ranks.

What is different from DeepSpeed's: frozen weights are there at every stage, and in fp32; stage 0, BF16_Optimizer and
universal folders are read; nothing is unpickled; each file of a sharded output holds its own weights alone. Buffers of
integers keep their dtype.

``python -m ds_ckpt.zero_to_fp32`` takes the arguments of ``zero_to_fp32.py``, the script that DeepSpeed copies beside
its checkpoints.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, cast

import torch

from ds_ckpt.exporting import as_torch, export
from ds_ckpt.ranges import Ranges
from ds_ckpt.reader import open as open_checkpoint
from ds_ckpt.weights import weights_of
from ds_core.errors import DsError
from ds_core.log import configure, logger

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from torch import Tensor, nn

    from ds_ckpt.weights import Weight

__all__ = [
    "LazyTensor",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "get_fp32_state_dict_from_zero_checkpoint",
    "load_state_dict_from_zero_checkpoint",
]


class LazyTensor:
    """A weight that is read when it is asked for, each time anew."""

    def __init__(self, weight: Weight, ranges: Ranges) -> None:
        self._weight, self._ranges = weight, ranges

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        return cast("torch.dtype", getattr(torch, self._weight.dtype))

    def numel(self) -> int:
        """Return the number of elements."""
        return self._weight.stored.of.numel

    def contiguous(self) -> Tensor:
        """Read it: a new tensor on the CPU.

        Raises:
            CheckpointError: its bytes are not what was written, naming the file.
        """
        values, _ = self._weight.read(self._ranges)
        return as_torch(values, self._weight.dtype, self._weight.shape)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._weight.stored.of.name!r} {list(self.shape)} {self.dtype}>"


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Any]:
    """Return all weights and persistent buffers in fp32 by name, on the CPU; names of one weight share a tensor.

    Args:
        checkpoint_dir: the folder with the tags, or the folder of a tag.
        tag: which; None: the one that ``latest`` names.
        exclude_frozen_parameters: leave out the weights that are not trained.
        lazy_mode: return a :class:`LazyTensor` for each, so that one at a time need be in memory.

    Raises:
        CheckpointError: there is none, or it is damaged, naming the file.
    """
    stored = open_checkpoint(checkpoint_dir, tag).stored
    weights, ranges = weights_of(stored, "float32", exclude_frozen=exclude_frozen_parameters), Ranges(stored)
    lazy = {name: LazyTensor(weight, ranges) for name, weight in weights.by_name.items()}
    found: dict[str, Any] = dict(lazy) if lazy_mode else {name: tensor.contiguous() for name, tensor in lazy.items()}
    return {**found, **{alias: found[name] for alias, name in weights.shared.items()}}


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | PathLike[str],
    output_dir: str | PathLike[str],
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write ``pytorch_model.bin`` with the weights in fp32, in shards with an index where they are larger.

    :func:`ds_ckpt.export` with DeepSpeed's arguments and defaults.
    """
    export(
        checkpoint_dir,
        output_dir,
        tag,
        "float32",
        max_shard_size,
        safe_serialization=safe_serialization,
        exclude_frozen_parameters=exclude_frozen_parameters,
    )


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | PathLike[str], tag: str | None = None
) -> nn.Module:
    """Move ``model`` to the CPU, load the weights of a checkpoint into it, and return it.

    What only one of both has is left as it is, with a warning.
    """
    model = model.cpu()
    result = model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False)
    for what, names in (
        ("only in the model", result.missing_keys),
        ("only in the checkpoint", result.unexpected_keys),
    ):
        if names:
            logger.warning("%d tensors, such as %r, are %s", len(names), names[0], what)
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the script; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ds_ckpt.zero_to_fp32",
        description="Write the weights of a checkpoint of any format in fp32, as transformers loads them.",
        epilog="`ds ckpt export` does the same without torch, in any dtype, and writes safetensors.",
    )
    parser.add_argument("checkpoint_dir", help="the folder with the tags, or the folder of a tag")
    parser.add_argument("output_dir", help="folder to write to, made if missing")
    parser.add_argument("--max_shard_size", default="5GB", help="of a file, such as 500MB; `none`: one file")
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors, not pytorch_model.bin")
    parser.add_argument("-t", "--tag", help="which checkpoint; default: what `latest` names")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="leave out what is not trained")
    parser.add_argument("-d", "--debug", action="store_true", help="log more")
    given = parser.parse_args(arguments)
    configure("debug" if given.debug else None)
    try:
        done = export(
            given.checkpoint_dir,
            given.output_dir,
            given.tag,
            "float32",
            None if given.max_shard_size.lower() == "none" else given.max_shard_size,
            safe_serialization=given.safe_serialization,
            exclude_frozen_parameters=given.exclude_frozen_parameters,
        )
    except DsError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{done.tensors} tensors: {given.output_dir}: {', '.join(done.files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
