"""Weights of a checkpoint as Hugging Face's libraries load them: :func:`export`. Loads no torch, but for ``.bin``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ds_ckpt.ranges import Ranges
from ds_ckpt.reader import open as open_checkpoint
from ds_ckpt.weights import weights_of
from ds_core.checkpoint.huggingface import parse_dtype, parse_size, plan_layout, write_layout
from ds_core.checkpoint.local import local_path
from ds_core.checkpoint.safetensors_format import Entry, write_stream
from ds_core.errors import MissingPackageError
from ds_core.log import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from os import PathLike
    from pathlib import Path

    import torch

    from ds_ckpt.casting import Array
    from ds_ckpt.weights import Weights
    from ds_core.checkpoint.huggingface import Exported, Layout

__all__ = ["as_torch", "export"]


def export(
    path: str | PathLike[str],
    output: str | PathLike[str],
    tag: str | None = None,
    dtype: str | torch.dtype | None = "float32",
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = True,
    exclude_frozen_parameters: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write the weights and persistent buffers of a checkpoint in Hugging Face's layout.

    The checkpoint may be of any format, stage and number of ranks. One tensor at a time is in memory; with
    ``safe_serialization=False`` those of one file. A weight with several names is written once, see
    :mod:`ds_core.checkpoint.huggingface`. Equal weights give equal files.

    Args:
        path: the folder with the tags, or the folder of a tag.
        output: a folder of this machine's, made if missing; weights of an earlier export in it are replaced, at no
            moment are there some of both.
        tag: which; None: the one that ``latest`` names, or ``path`` itself where it is a checkpoint.
        dtype: ``float32``, ``bfloat16`` or ``float16``, also as ``fp32``, ``bf16``, ``fp16`` or a ``torch.dtype``: what
            floating tensors are cast to, frozen weights and buffers too, from masters where there are any; None: the
            weights as the model has them.
        max_shard_size: of a file, such as ``"5GB"``; a larger tensor has one of its own. None: one file.
        safe_serialization: ``model.safetensors`` rather than ``pytorch_model.bin``, which needs torch.
        exclude_frozen_parameters: leave out the weights that are not trained.
        progress: told (bytes written since the last time, bytes in all).

    Raises:
        CheckpointError: the checkpoint is damaged, naming file and tensor; or the disk is full, ...
    """
    word = parse_dtype(dtype)
    parse_size(max_shard_size)
    if not safe_serialization:
        _need_torch()
    folder = local_path(output, "output")
    with open_checkpoint(path, tag) as checkpoint:
        weights = weights_of(checkpoint.stored, word, exclude_frozen=exclude_frozen_parameters)
        ranges = Ranges(checkpoint.stored)
        try:
            return _Exporting(weights, ranges, progress).write(
                folder, word, max_shard_size, safe_serialization=safe_serialization
            )
        finally:
            ranges.close()


def as_torch(values: Array, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return elements in the form of ``casting.BITS`` as a tensor; no copy."""
    import torch

    return torch.from_numpy(values).view(getattr(torch, dtype)).reshape(shape)


class _Exporting:
    """One export."""

    def __init__(self, weights: Weights, ranges: Ranges, progress: Callable[[int, int], None] | None) -> None:
        self.weights, self.ranges = weights, ranges
        self.progress = progress or (lambda _done, _total: None)
        self.beyond: dict[str, None] = {}
        self.total = 0

    def write(
        self, folder: Path, dtype: str | None, max_shard_size: str | int | None, *, safe_serialization: bool
    ) -> Exported:
        by_name = self.weights.by_name
        entries = [Entry(name, weight.dtype, weight.shape) for name, weight in by_name.items()]
        self.total = sum(entry.nbytes for entry in entries)
        layout = plan_layout(
            entries, self.weights.shared, max_shard_size=max_shard_size, safe_serialization=safe_serialization
        )
        writer = self.write_safetensors if safe_serialization else self.write_bin
        write_layout(folder, layout, lambda path, name: writer(path, name, layout))
        if self.beyond:
            logger.warning(
                "%d tensors, such as %r, have values that %s cannot hold: they are infinite now",
                len(self.beyond),
                next(iter(self.beyond)),
                dtype,
            )
        return layout.exported(folder, self.beyond)

    def write_safetensors(self, path: Path, name: str, layout: Layout) -> None:
        write_stream(path, layout.files[name], layout.metadata(name), self.blocks)

    def blocks(self, entry: Entry) -> Iterator[Any]:
        for values, is_beyond in self.weights.by_name[entry.name].blocks(self.ranges):
            self.note(entry.name, is_beyond)
            yield values.view("|u1").data
            self.progress(values.nbytes, self.total)

    def write_bin(self, path: Path, name: str, layout: Layout) -> None:
        from ds_core.checkpoint.files import write_torch_file

        tensors: dict[str, torch.Tensor] = {}
        for entry in layout.files[name]:
            values, is_beyond = self.weights.by_name[entry.name].read(self.ranges)
            self.note(entry.name, is_beyond)
            tensors[entry.name] = as_torch(values, entry.dtype, entry.shape)
        tensors.update({alias: tensors[of] for alias, of in layout.aliases_in(name).items()})
        write_torch_file(path, tensors)
        self.progress(sum(entry.nbytes for entry in layout.files[name]), self.total)

    def note(self, name: str, is_beyond: bool) -> None:
        if is_beyond:
            self.beyond[name] = None


def _need_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "a .bin file is written with torch, which is not installed",
            where="export",
            fix="write safetensors, the default, or pip install torch",
        ) from error
