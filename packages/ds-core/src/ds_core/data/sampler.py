"""Which samples a rank takes, in which order, from any position of an epoch."""

from __future__ import annotations

from collections.abc import Sized
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from ds_core.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["EpochSampler", "ForeignSampler"]

_BLOCK_NUMEL = 2**16
"""Indices made into Python ints at a time: a list of all of them would take many times the tensor's memory."""


class EpochSampler(Sampler[int]):
    """This rank's share of a permutation of the data set, new in every epoch.

    The permutation depends on ``seed + epoch`` alone, not on the ranks. They take it in turns: rank r has every W-th
    sample from the r-th on. So after k micro-batches of m samples on each of W ranks, the samples consumed are the
    first k*m*W of the permutation, and that one number is a position which any other m and W can go on from.

    Ranks get equally many samples: the end is filled up with samples from the beginning of the permutation, or, with
    ``drop_last``, cut off.

    Args:
        num_samples: size of the data set.
        dp_world_size: W, ranks that share the epoch.
        dp_rank: r, place among them.
        seed: added to the epoch's number.
        shuffle: without it the permutation is the order of the data set.
        drop_last: drop the last samples of an epoch that do not make one for each rank.

    Raises:
        DataError: ``dp_rank`` is not below ``dp_world_size``.

    >>> sampler = EpochSampler(5, dp_world_size=2, dp_rank=1, shuffle=False)
    >>> list(sampler)
    [1, 3, 0]
    >>> sampler.set_position(0, 4)
    >>> list(sampler)
    [0]
    """

    def __init__(
        self,
        num_samples: int,
        *,
        dp_world_size: int = 1,
        dp_rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        if not 0 <= dp_rank < dp_world_size:
            raise DataError(
                f"data-parallel rank {dp_rank} of {dp_world_size}", fix=f"use a rank from 0 to {dp_world_size - 1}"
            )
        self.num_samples = num_samples
        self.dp_world_size = dp_world_size
        self.dp_rank = dp_rank
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._epoch = 0
        self._start = 0

    def set_position(self, epoch: int, start: int) -> None:
        """Let the next iteration begin after the first ``start`` samples, of all ranks, of ``epoch``."""
        self._epoch, self._start = epoch, min(start, self.num_samples)

    def consumed(self, taken: int) -> int:
        """Return how many samples of the epoch all ranks have consumed, this one having ``taken`` since the start."""
        share = self._share(self.num_samples - self._start)
        # The samples that fill up the end are no further ones.
        return min(self._start + min(taken, share) * self.dp_world_size, self.num_samples)

    def __iter__(self) -> Iterator[int]:
        left = self._share(self.num_samples - self._start) * self.dp_world_size
        if left == 0:
            return
        places = torch.arange(self._start + self.dp_rank, self._start + left, self.dp_world_size) % self.num_samples
        mine = self._permutation()[places] if self.shuffle else places
        for block in mine.split(_BLOCK_NUMEL):
            yield from block.tolist()

    def __len__(self) -> int:
        """Return the number of samples that this rank has in a whole epoch."""
        return self._share(self.num_samples)

    def _share(self, samples: int) -> int:
        return samples // self.dp_world_size if self.drop_last else -(-samples // self.dp_world_size)

    def _permutation(self) -> torch.Tensor:
        # A generator of its own: drawing from torch's would change what the model draws, and with it a resumed run.
        generator = torch.Generator().manual_seed(self.seed + self._epoch)
        return torch.randperm(self.num_samples, generator=generator)


class ForeignSampler(Sampler[int]):
    """A sampler of the caller's, which yields this rank's indices, from a position on.

    The indices before the position are drawn and dropped; no sample of them is loaded. So a resumed epoch is the same
    only if the sampler yields the same again: with its own generator, or by ``set_epoch``, which is called with the
    epoch where there is one. At a number of ranks that does not divide the position, it is rounded down.
    """

    def __init__(self, sampler: Iterable[int], dp_world_size: int) -> None:
        self.sampler = sampler
        self.dp_world_size = dp_world_size
        self._skip = 0

    def set_position(self, epoch: int, start: int) -> None:
        """Let the next iteration begin after the first ``start`` samples, of all ranks, of ``epoch``."""
        self._skip = start // self.dp_world_size
        set_epoch: Any = getattr(self.sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def consumed(self, taken: int) -> int:
        """Return how many samples of the epoch all ranks have consumed, this one having ``taken`` since the start."""
        mine = self._skip + taken
        if isinstance(self.sampler, Sized):
            mine = min(mine, max(len(self.sampler), self._skip))
        return mine * self.dp_world_size

    def __iter__(self) -> Iterator[int]:
        return islice(iter(self.sampler), self._skip, None)
