"""Batches and positions: ds_core.data.DeepSpeedDataLoader."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, DistributedSampler, IterableDataset

from ds_core import log
from ds_core.data import DeepSpeedDataLoader, EpochSampler
from ds_core.errors import DataError, NotBuiltError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Loads(Dataset):
    """Sample i is i; keeps which ones were loaded."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        self.loaded.append(index)
        return index


class Stream(IterableDataset):
    """Counts up from its epoch."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(100 * self.epoch, 100 * self.epoch + self.n))


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.n


def _ranks(n: int, m: int, world: int, **options: Any) -> list[DeepSpeedDataLoader]:
    return [
        DeepSpeedDataLoader(Loads(n), m, data_parallel_world_size=world, data_parallel_rank=rank, **options)
        for rank in range(world)
    ]


def _lists(batches: Any) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def _flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def _permutation(n: int, epoch: int = 0, seed: int = 0) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def _through_json(state: dict[str, int]) -> dict[str, int]:
    return json.loads(json.dumps(state))


# Batches


def test_an_epoch_is_the_permutation_in_batches() -> None:
    loader = DeepSpeedDataLoader(Loads(10), 4)
    order = _permutation(10)
    assert _lists(loader) == [order[:4], order[4:8], order[8:]]
    assert len(loader) == 3


def test_drop_last() -> None:
    loaders = _ranks(11, 2, 2, dataloader_drop_last=True)
    order = _permutation(11)
    # 5 turns of 2 ranks, so 2 full batches each.
    assert [_lists(loader) for loader in loaders] == [
        [[order[0], order[2]], [order[4], order[6]]],
        [[order[1], order[3]], [order[5], order[7]]],
    ]
    assert [len(loader) for loader in loaders] == [2, 2]


def test_ranks_have_equally_many_batches_of_equal_size() -> None:
    shapes = [[len(batch) for batch in loader] for loader in _ranks(11, 2, 4)]
    assert shapes == [[2, 1]] * 4


def test_options_reach_torch() -> None:
    loader = DeepSpeedDataLoader(Loads(4), 2, collate_fn=lambda samples: ("mine", samples), shuffle=False)
    assert list(loader) == [("mine", [0, 1]), ("mine", [2, 3])]


def test_the_arguments_of_deepspeed_by_position_and_by_name() -> None:
    dataset, sampler = Loads(4), EpochSampler(4)
    by_position = DeepSpeedDataLoader(dataset, 2, True, 0, None, None, None, sampler, 1, 0, False, {})
    assert by_position.dataset is dataset
    assert by_position.batch_size == 2
    assert by_position.data_sampler is sampler
    by_name = DeepSpeedDataLoader(
        dataset=dataset,
        batch_size=2,
        pin_memory=False,
        local_rank=0,
        tput_timer=None,
        collate_fn=None,
        num_local_io_workers=0,
        data_sampler=None,
        data_parallel_world_size=1,
        data_parallel_rank=0,
        dataloader_drop_last=False,
        deepspeed_dataloader_config=None,
    )
    assert _lists(by_name) == _lists(by_position)
    assert by_name.num_workers == by_position.num_workers == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="pins where there is a GPU")
def test_nothing_is_pinned_without_a_gpu() -> None:
    # torch would warn, and warnings are errors here.
    loader = DeepSpeedDataLoader(Loads(2), 1, pin_memory=True)
    assert not loader.pin_memory
    assert len(list(loader)) == 2


def test_the_throughput_timer_is_started_for_every_batch() -> None:
    class Timer:
        started = 0

        def start(self) -> None:
            self.started += 1

    timer = Timer()
    loader = DeepSpeedDataLoader(Loads(4), 2, tput_timer=timer)
    next(iter(loader))
    assert timer.started == 1


# Epochs


def test_every_epoch_has_an_order_of_its_own() -> None:
    loader = DeepSpeedDataLoader(Loads(6), 3, seed=5)
    for epoch in range(3):
        assert _flat(_lists(loader)) == _permutation(6, epoch, seed=5)


def test_an_epoch_left_in_the_middle_begins_anew() -> None:
    loader = DeepSpeedDataLoader(Loads(6), 2)
    first = next(iter(loader)).tolist()
    assert _flat(_lists(loader)) == _permutation(6)
    assert first == _permutation(6)[:2]


def test_a_finished_iterator_stays_finished() -> None:
    loader = DeepSpeedDataLoader(Loads(2), 2)
    iterator = iter(loader)
    assert len(list(iterator)) == 1
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(iterator)
        with pytest.raises(StopIteration):
            next(loader)
    assert loader.state_dict()["epoch"] == 1
    assert len(list(iter(loader))) == 1


def test_an_iterator_is_gone_on_with() -> None:
    """As with any of Python's: ``islice`` and ``for`` call ``iter()`` on it and begin nothing anew."""
    loader = DeepSpeedDataLoader(Loads(10), 2)
    iterator = iter(loader)
    windows = [_lists(islice(iterator, 2)) for _ in range(3)]
    assert [batch for window in windows for batch in window] == _lists(DeepSpeedDataLoader(Loads(10), 2))
    assert iter(iterator) is iterator


def test_next_on_the_loader_goes_on_with_the_pass() -> None:
    loader = DeepSpeedDataLoader(Loads(6), 2)
    iterator = iter(loader)
    order = _permutation(6)
    assert [next(loader).tolist(), next(iterator).tolist(), next(loader).tolist()] == [order[:2], order[2:4], order[4:]]


def test_a_pass_that_another_one_ended() -> None:
    loader = DeepSpeedDataLoader(Loads(6), 2)
    first = iter(loader)
    next(first)
    second = iter(loader)
    with pytest.raises(DataError, match="this pass over the data has ended"):
        next(first)
    assert len(list(second)) == 3


def test_an_empty_data_set() -> None:
    for loader in _ranks(0, 2, 3):
        assert len(loader) == 0
        assert list(loader) == []


# Positions


def test_the_position_is_what_was_handed_out() -> None:
    loader = DeepSpeedDataLoader(Loads(10), 4, seed=3)
    seen = [loader.state_dict()["consumed_samples"]]
    seen += [loader.state_dict()["consumed_samples"] for _ in loader]
    assert seen == [0, 4, 8, 10]
    assert loader.state_dict() == {"epoch": 1, "consumed_samples": 0, "seed": 3, "dataset_len": 10}


@settings(deadline=None)
@given(
    n=st.integers(1, 60),
    m1=st.integers(1, 5),
    w1=st.integers(1, 4),
    m2=st.integers(1, 5),
    w2=st.integers(1, 4),
    data=st.data(),
)
def test_resume_at_any_world_and_batch_size(n: int, m1: int, w1: int, m2: int, w2: int, data: st.DataObject) -> None:
    """Every sample once, in the order of one permutation, and none loaded to get there."""
    before = _ranks(n, m1, w1, seed=11)
    batches = data.draw(st.integers(0, len(before[0])))
    first = [_lists(islice(loader, batches)) for loader in before]
    states = [_through_json(loader.state_dict()) for loader in before]
    assert all(state == states[0] for state in states)
    consumed = states[0]["consumed_samples"]
    assert consumed == min(n, batches * m1 * w1)
    order = _permutation(n, seed=11)
    assert _consumed(first)[:consumed] == order[:consumed]

    after = _ranks(n, m2, w2)
    for loader in after:
        loader.load_state_dict(states[0])
    rest = _consumed([_lists(loader) for loader in after])
    assert rest[: n - consumed] == order[consumed:]
    assert len(rest) - (n - consumed) < w2
    assert sum(len(loader.dataset.loaded) for loader in after) == len(rest)
    # The next epoch is whole, and the one that the uninterrupted run has.
    assert _consumed([_lists(loader) for loader in after])[:n] == _permutation(n, epoch=1, seed=11)


def _consumed(ranks: list[list[list[int]]]) -> list[int]:
    """Return the indices in the order in which the ranks take turns."""
    flat = [_flat(batches) for batches in ranks]
    return [index for turn in zip(*flat, strict=True) for index in turn]


@pytest.mark.parametrize("stop", range(6))
def test_a_resumed_run_equals_the_uninterrupted_one(stop: int) -> None:
    """At one world size the batches themselves are the same, over two epochs of 5 batches."""
    for whole, stopped, resumed in zip(_ranks(9, 2, 1), _ranks(9, 2, 1), _ranks(9, 2, 1), strict=True):
        expected = _lists(whole) + _lists(whole)
        begun = _lists(islice(stopped, stop))
        resumed.load_state_dict(stopped.state_dict())
        assert begun + _lists(resumed) + _lists(resumed) == expected


def test_workers_that_load_ahead_do_not_move_the_position() -> None:
    loader = DeepSpeedDataLoader(Loads(12), 2, num_local_io_workers=1)
    iterator = iter(loader)
    next(iterator)
    assert loader.state_dict()["consumed_samples"] == 2
    resumed = DeepSpeedDataLoader(Loads(12), 2)
    resumed.load_state_dict(loader.state_dict())
    assert _lists(iterator) == _lists(resumed)


def test_loading_in_the_middle_of_a_pass() -> None:
    loader = DeepSpeedDataLoader(Loads(8), 2)
    order = _permutation(8)
    iterator = iter(loader)
    next(iterator)
    loader.load_state_dict({"epoch": 0, "consumed_samples": 6, "seed": 0})
    assert _lists(iterator) == [order[6:]]


def test_a_loaded_position_holds_until_a_batch_is_taken() -> None:
    loader = DeepSpeedDataLoader(Loads(8), 2)
    order = _permutation(8)
    loader.load_state_dict({"epoch": 0, "consumed_samples": 4, "seed": 0})
    iter(loader)
    iter(loader)
    assert loader.state_dict()["consumed_samples"] == 4
    assert next(iter(loader)).tolist() == order[4:6]
    assert _lists(loader)[0] == order[:2]  # left in the middle: anew


def test_loading_at_the_end_of_an_epoch() -> None:
    """The loop over the finished epoch is empty, and the next one is the next epoch."""
    loader = DeepSpeedDataLoader(Loads(8), 2)
    for _ in range(4):
        last = next(loader)
    assert last is not None
    resumed = DeepSpeedDataLoader(Loads(8), 2)
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == []
    assert _flat(_lists(resumed)) == _permutation(8, epoch=1)


def test_the_seed_of_the_position_counts() -> None:
    saved = DeepSpeedDataLoader(Loads(8), 2, seed=4).state_dict()
    loader = DeepSpeedDataLoader(Loads(8), 2, seed=9)
    loader.load_state_dict(saved)
    assert _flat(_lists(loader)) == _permutation(8, seed=4)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [Loads, Stream])
def test_a_pass_draws_nothing_from_torchs_generator(kind: type, workers: int) -> None:
    loader = DeepSpeedDataLoader(kind(4), 2, num_local_io_workers=workers)
    before = torch.get_rng_state()
    assert len(list(loader)) >= 2
    assert torch.equal(torch.get_rng_state(), before)


def test_another_size_of_the_data_set_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    log.reset()
    loader = DeepSpeedDataLoader(Loads(6), 2)
    loader.load_state_dict({"epoch": 0, "consumed_samples": 8, "seed": 0, "dataset_len": 10})
    assert "had 10 samples when its position was saved and has 6 now" in caplog.text
    assert list(loader) == []


# The caller's sampler


def test_a_callers_sampler_at_a_position() -> None:
    def build(rank: int, m: int) -> DeepSpeedDataLoader:
        dataset = Loads(12)
        sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, seed=3)
        return DeepSpeedDataLoader(
            dataset, m, data_sampler=sampler, data_parallel_world_size=2, data_parallel_rank=rank
        )

    for rank in range(2):
        whole = build(rank, 2)
        expected = _flat(_lists(whole))
        assert expected != _flat(_lists(whole)), "set_epoch is called, so the next epoch differs"
        begun = build(rank, 2)
        taken = _lists(islice(begun, 2))
        assert begun.state_dict()["consumed_samples"] == 8
        resumed = build(rank, 1)
        resumed.load_state_dict(begun.state_dict())
        assert _flat(taken) + _flat(_lists(resumed)) == expected
        assert len(resumed.dataset.loaded) == 2
        assert len(resumed) == 6


def test_an_epoch_sampler_of_the_callers() -> None:
    loader = DeepSpeedDataLoader(Loads(4), 2, data_sampler=EpochSampler(4, seed=6))
    assert loader.state_dict()["seed"] == 6
    loader.load_state_dict({"epoch": 1, "consumed_samples": 2, "seed": 8})
    assert _lists(loader) == [_permutation(4, epoch=1, seed=8)[2:]]


# Iterable data sets


def test_an_iterable_data_set_is_taken_as_it_is() -> None:
    for loader in [
        DeepSpeedDataLoader(Stream(5), 2, data_parallel_world_size=2, data_parallel_rank=rank) for rank in (0, 1)
    ]:
        assert loader.data_sampler is None
        assert _lists(loader) == [[0, 1], [2, 3], [4]]
        assert _lists(loader) == [[100, 101], [102, 103], [104]], "set_epoch is called"
    assert _lists(DeepSpeedDataLoader(Stream(5), 2, dataloader_drop_last=True)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("stop", range(4))
def test_an_iterable_data_set_resumes_after_the_batches_handed_out(stop: int) -> None:
    whole, begun, resumed = (DeepSpeedDataLoader(Stream(5), 2) for _ in range(3))
    expected = _lists(whole) + _lists(whole)
    taken = _lists(islice(begun, stop))
    state = _through_json(begun.state_dict())
    assert state == {"epoch": 0, "batches": stop}
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert taken + _lists(resumed) + _lists(resumed) == expected


def test_the_length_of_an_iterable_data_set() -> None:
    assert len(DeepSpeedDataLoader(SizedStream(5), 2)) == 3
    assert len(DeepSpeedDataLoader(SizedStream(5), 2, dataloader_drop_last=True)) == 2
    with pytest.raises(TypeError, match="no len"):
        len(DeepSpeedDataLoader(Stream(5), 2))


# Mistakes


class NoLength:
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("dataset", [NoLength(), iter([1, 2]), 7])
def test_what_is_no_data_set(dataset: object) -> None:
    with pytest.raises(DataError, match=rf"(?s)a {type(dataset).__name__} is no data set.*IterableDataset"):
        DeepSpeedDataLoader(dataset, 2)


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, None, True])
def test_a_batch_size_that_is_none(batch_size: object) -> None:
    with pytest.raises(DataError, match=f"batch_size is {batch_size!r}"):
        DeepSpeedDataLoader(Loads(4), batch_size)  # type: ignore[arg-type]


def test_a_sampler_for_an_iterable_data_set() -> None:
    with pytest.raises(DataError, match="takes no data_sampler"):
        DeepSpeedDataLoader(Stream(4), 2, data_sampler=EpochSampler(4))


def test_a_curriculum() -> None:
    with pytest.raises(NotBuiltError, match="curriculum learning is not built yet"):
        DeepSpeedDataLoader(Loads(4), 2, deepspeed_dataloader_config={"curriculum_learning": {}})


def test_a_position_of_the_other_kind() -> None:
    sized, stream = DeepSpeedDataLoader(Loads(4), 2), DeepSpeedDataLoader(Stream(4), 2)
    with pytest.raises(DataError, match=r"(?s)lacks batches: .*an IterableDataset"):
        stream.load_state_dict(sized.state_dict())
    with pytest.raises(DataError, match=r"(?s)lacks consumed_samples: .*a data set with a length"):
        sized.load_state_dict(stream.state_dict())
    with pytest.raises(DataError, match="lacks epoch and consumed_samples"):
        sized.load_state_dict({})


# Ranks


@pytest.mark.parametrize("rank", [0, 1])
def test_the_ranks_are_those_of_torch_distributed(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    order = _permutation(6)
    assert _flat(_lists(DeepSpeedDataLoader(Loads(6), 2))) == order[rank::2]
