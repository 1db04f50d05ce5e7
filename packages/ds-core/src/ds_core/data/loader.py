"""Batches for one rank, from a position that a checkpoint can hold."""

from __future__ import annotations

import logging
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from ds_core.accelerator import get_accelerator
from ds_core.data.sampler import EpochSampler, ForeignSampler
from ds_core.errors import DataError, NotBuiltError
from ds_core.log import log_dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["DeepSpeedDataLoader"]


class DeepSpeedDataLoader:
    """This rank's micro-batches, epoch after epoch.

    There is one pass at a time: a new ``iter()`` ends the one before. It begins

    - the next epoch, in a new order, if the last one was finished;
    - the present epoch anew, in the same order, if it was left in the middle (a ``break``, a look at one batch);
    - at the loaded position, if :meth:`load_state_dict` was called and no batch was taken since.

    The position is what ``next()`` has handed out; batches that workers have loaded ahead do not count. It can be
    loaded at any number of ranks and any batch size, and loads no sample twice to get there. Beginning a pass draws
    nothing from torch's global generator, so a resumed run sees the random numbers of the uninterrupted one.
    Random transforms that run in workers (``num_local_io_workers`` above 0) have generators of their own, seeded by
    the epoch, and are not part of the position.

    An ``IterableDataset`` has no sampler: every rank takes it as it is, and sharding it over ranks and workers is its
    own business. Its position is a number of batches, reached again by loading and dropping them, and means the same
    only at the same batch size and numbers of ranks and workers. ``set_epoch`` is called on it where there is one.

    Args:
        dataset: has ``__getitem__`` and ``__len__``, or is an ``IterableDataset``.
        batch_size: samples of a micro-batch on this rank.
        pin_memory: put batches into page-locked memory; only where the accelerator is cuda.
        local_rank: taken as DeepSpeed's is; a loader does not depend on it.
        tput_timer: its ``start()`` is called before a batch is taken.
        collate_fn: list of samples -> batch; None for torch's.
        num_local_io_workers: worker processes of this rank; None for 0, which loads in this process.
        data_sampler: yields this rank's indices; None for an :class:`~ds_core.data.sampler.EpochSampler`. See
            :class:`~ds_core.data.sampler.ForeignSampler` for what a resumed epoch asks of it.
        data_parallel_world_size: ranks that share the data; None for all of torch.distributed, or 1 without it.
        data_parallel_rank: this one's place among them; None likewise.
        dataloader_drop_last: drop the samples at an epoch's end that do not fill a micro-batch on every rank.
        deepspeed_dataloader_config: curriculum learning, which is not built yet.
        seed: of the order; the epoch is added to it.
        shuffle: False keeps the order of the data set, as for evaluation.

    Raises:
        DataError: ``dataset``, ``batch_size`` or the rank cannot be used.

    >>> loader = DeepSpeedDataLoader(range(5), 2, shuffle=False)
    >>> [batch.tolist() for batch in loader]
    [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        pin_memory: bool = True,
        local_rank: int = -1,
        tput_timer: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
        data_sampler: Iterable[int] | None = None,
        data_parallel_world_size: int | None = None,
        data_parallel_rank: int | None = None,
        dataloader_drop_last: bool = False,
        deepspeed_dataloader_config: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        _check(dataset, batch_size, data_sampler, deepspeed_dataloader_config)
        self.dataset = dataset
        self.batch_size = batch_size
        self.collate_fn = collate_fn
        self.drop_last = dataloader_drop_last
        self.num_workers = num_local_io_workers or 0
        self.pin_memory = pin_memory and get_accelerator().device_name() == "cuda"
        self.tput_timer = tput_timer
        self.dp_world_size = _world_size() if data_parallel_world_size is None else data_parallel_world_size
        self.dp_rank = _rank() if data_parallel_rank is None else data_parallel_rank
        self.seed = data_sampler.seed if isinstance(data_sampler, EpochSampler) else seed
        self.data_sampler = data_sampler if data_sampler is not None else self._own_sampler(shuffle)
        self._walk = self._positioned(self.data_sampler)
        self._epoch = 0
        self._start = 0  # where the present pass begins: samples of all ranks, or batches of an IterableDataset
        self._handed_batches = 0  # out since then
        self._keep_start = False  # a position was loaded, and no batch taken since
        self._exhausted = False
        self._pass_number = 0
        self._batches: Iterator[Any] | None = None

    def __len__(self) -> int:
        """Return the number of micro-batches of a whole epoch.

        Raises:
            TypeError: the data set, or the caller's sampler, does not know its length.
        """
        samples = len(self.dataset if self.data_sampler is None else self.data_sampler)  # type: ignore[arg-type]
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        if not self._keep_start:
            self._start = 0
        self._begin()
        self._pass_number += 1
        return _Pass(self, self._pass_number)

    def __next__(self) -> Any:
        """Return the next batch of the present pass, as ``next()`` on what ``iter()`` returned does."""
        if self._exhausted:
            raise StopIteration  # until iter() begins the next epoch, as Python asks of iterators
        if self.tput_timer is not None:
            self.tput_timer.start()
        if self._batches is None:
            self._batches = self._open()
        try:
            batch = next(self._batches)
        except StopIteration:
            self._epoch, self._start, self._keep_start = self._epoch + 1, 0, False
            self._begin()
            self._exhausted = True
            raise
        self._handed_batches += 1
        self._keep_start = False
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return the position, the same on every rank, as JSON can hold it."""
        if self._walk is None:
            return {"epoch": self._epoch, "batches": self._start + self._handed_batches}
        return {
            "epoch": self._epoch,
            "consumed_samples": self._consumed(),
            "seed": self.seed,
            "dataset_len": len(self.dataset),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state`` with the next batch, also in the middle of a pass. The seed is the state's.

        Raises:
            DataError: ``state`` is that of the other kind of data set, or of another loader.
        """
        unit = "batches" if self._walk is None else "consumed_samples"
        missing = [key for key in ("epoch", unit) if key not in state]
        if missing:
            kind = "an IterableDataset" if self._walk is None else "a data set with a length"
            raise DataError(
                f"the saved position lacks {' and '.join(missing)}: {dict(state)}",
                where=f"the position of {kind}",
                fix="load it with the kind of data set that it was saved with",
            )
        self._epoch, self._start = int(state["epoch"]), int(state[unit])
        self.seed = int(state.get("seed", self.seed))
        if isinstance(self.data_sampler, EpochSampler):
            self.data_sampler.seed = self.seed
        if self._walk is not None and state.get("dataset_len", len(self.dataset)) != len(self.dataset):
            log_dist(
                f"the data set had {state['dataset_len']} samples when its position was saved and has "
                f"{len(self.dataset)} now: this epoch repeats some samples and leaves out others",
                level=logging.WARNING,
            )
        self._begin()
        self._keep_start = True

    def _begin(self) -> None:
        self._handed_batches = 0
        self._exhausted = False
        self._batches = None  # opened by the first next(), so that a position loaded until then still counts

    def _open(self) -> Iterator[Any]:
        """Begin a pass at ``(self._epoch, self._start)`` with a new torch DataLoader."""
        generator = torch.Generator().manual_seed((self.seed + self._epoch) * self.dp_world_size + self.dp_rank)
        if self._walk is not None:
            self._walk.set_position(self._epoch, self._start)
        elif hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self._epoch)
        batches = iter(
            DataLoader(
                self.dataset,
                batch_size=self.batch_size,
                sampler=self._walk,
                num_workers=self.num_workers,
                collate_fn=self.collate_fn,
                pin_memory=self.pin_memory,
                drop_last=self.drop_last,
                # Without one, the seed of the workers comes from torch's global generator, even if there are none.
                generator=generator,
            )
        )
        if self._walk is None:
            for _ in islice(batches, self._start):
                pass
        return batches

    def _consumed(self) -> int:
        if self._walk is None or self._handed_batches == 0:
            return self._start
        return self._walk.consumed(self._handed_batches * self.batch_size)

    def _own_sampler(self, shuffle: bool) -> EpochSampler | None:
        if isinstance(self.dataset, IterableDataset):
            return None
        return EpochSampler(
            len(self.dataset),
            dp_world_size=self.dp_world_size,
            dp_rank=self.dp_rank,
            seed=self.seed,
            shuffle=shuffle,
            drop_last=self.drop_last,
        )

    def _positioned(self, sampler: Iterable[int] | None) -> EpochSampler | ForeignSampler | None:
        if sampler is None or isinstance(sampler, EpochSampler):
            return sampler
        return ForeignSampler(sampler, self.dp_world_size)


class _Pass:
    """What ``iter(loader)`` returns: a second ``iter()`` on it, as ``islice`` and ``for`` do, begins nothing anew."""

    def __init__(self, loader: DeepSpeedDataLoader, number: int) -> None:
        self._loader = loader
        self._number = number

    def __iter__(self) -> _Pass:
        return self

    def __next__(self) -> Any:
        if self._loader._pass_number != self._number:
            raise DataError(
                "this pass over the data has ended: iter() was called on its loader again",
                where="DeepSpeedDataLoader",
                fix="take both from one iterator, or give each loop a loader of its own",
            )
        return next(self._loader)


def _check(dataset: Any, batch_size: Any, data_sampler: Any, curriculum: Mapping[str, Any] | None) -> None:
    if curriculum:
        raise NotBuiltError(
            "curriculum learning is not built yet: it comes with a later release of ds-core",
            where="deepspeed_dataloader_config",
            fix="leave it out, or order the data in a data_sampler",
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise DataError(f"batch_size is {batch_size!r}, expected an int of at least 1", where="DeepSpeedDataLoader")
    if isinstance(dataset, IterableDataset):
        if data_sampler is not None:
            raise DataError(
                "an IterableDataset takes no data_sampler: it chooses its own samples", where="DeepSpeedDataLoader"
            )
    elif not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise DataError(
            f"a {type(dataset).__name__} is no data set: it has not both __getitem__ and __len__",
            where="DeepSpeedDataLoader",
            fix="add them, or derive its class from torch.utils.data.IterableDataset and give it __iter__",
        )


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
