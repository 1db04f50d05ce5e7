"""Reads checkpoints that DeepSpeed itself wrote, stages 0 to 3, and its universal folders. Loads no torch.

Its files are pickles; they are never given to ``pickle``. :mod:`.unpickle` interprets them with a list of names,
:mod:`.torchfile` finds each storage's bytes, :mod:`.layout` says whose elements they are; nothing else is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_core.checkpoint.folder import is_deepspeed

if TYPE_CHECKING:
    from pathlib import Path

    from ds_ckpt.stored import Stored

__all__ = ["is_deepspeed", "read_deepspeed"]


def read_deepspeed(folder: Path) -> Stored:
    """Return what the checkpoint in ``folder``, of a tag, holds. No tensor is read.

    Names of parameters are the first under which the model has them; a tied one is there once. At stage 3 there are
    no weights, only masters. Random generators, the position in the data and gradients are not in these checkpoints.

    Raises:
        CheckpointError: a file or rank is missing; tensor or pipeline parallelism, experts, NVMe; a pickle that names
            what is not on the list; a file that is damaged or not what ``torch.save`` writes.
    """
    from ds_ckpt.formats.deepspeed.layout import read_folder

    return read_folder(folder)
