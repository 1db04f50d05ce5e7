"""Positions within an epoch: ds_core.data.sampler."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from ds_core.data.sampler import EpochSampler, ForeignSampler
from ds_core.errors import DataError

sizes = st.integers(min_value=0, max_value=70)
worlds = st.integers(min_value=1, max_value=6)


def _all_ranks(n: int, world: int, start: int = 0, epoch: int = 0, **options: bool) -> list[list[int]]:
    ranks = []
    for rank in range(world):
        sampler = EpochSampler(n, dp_world_size=world, dp_rank=rank, **options)
        sampler.set_position(epoch, start)
        ranks.append(list(sampler))
    return ranks


def _in_turns(ranks: list[list[int]]) -> list[int]:
    return [index for turn in zip(*ranks, strict=True) for index in turn]


def _permutation(n: int, epoch: int = 0) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(epoch)).tolist()


@given(sizes, worlds, st.data())
def test_the_ranks_take_the_rest_of_the_permutation_in_turns(n: int, world: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(min_value=0, max_value=n))
    taken = _in_turns(_all_ranks(n, world, start, epoch=3))
    order = _permutation(n, epoch=3)
    assert taken[: n - start] == order[start:]
    filling = taken[n - start :]
    assert len(filling) < world
    assert filling == (order * world)[: len(filling)]


@given(sizes, worlds, st.data())
def test_drop_last_cuts_instead_of_filling_up(n: int, world: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(min_value=0, max_value=n))
    taken = _in_turns(_all_ranks(n, world, start, drop_last=True))
    whole_turns = (n - start) // world * world
    assert taken == _permutation(n)[start : start + whole_turns]


@given(sizes, worlds)
def test_length_is_that_of_a_whole_epoch(n: int, world: int) -> None:
    for drop_last in (False, True):
        sampler = EpochSampler(n, dp_world_size=world, drop_last=drop_last)
        assert len(sampler) == len(list(sampler))
        expected = len(sampler)
        sampler.set_position(2, n // 2)
        assert len(sampler) == expected


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_without_shuffling_it_is_torchs_distributed_sampler(world: int) -> None:
    """The reference for striding and filling up, on sizes that divide and that do not."""
    for n in (5, 6, 24):
        theirs = [list(DistributedSampler(range(n), world, rank, shuffle=False)) for rank in range(world)]
        assert _all_ranks(n, world, shuffle=False) == theirs


def test_every_epoch_has_an_order_of_its_own() -> None:
    orders = [_all_ranks(50, 1, epoch=epoch)[0] for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert _all_ranks(50, 1, epoch=2)[0] == orders[2]


def test_the_seed_is_added_to_the_epoch() -> None:
    sampler = EpochSampler(50, seed=7)
    sampler.set_position(3, 0)
    assert list(sampler) == _permutation(50, epoch=10)


@given(sizes, worlds, st.data())
def test_consumed_counts_all_ranks_and_no_filling(n: int, world: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(min_value=0, max_value=n))
    taken = data.draw(st.integers(min_value=0, max_value=80))
    sampler = EpochSampler(n, dp_world_size=world)
    sampler.set_position(0, start)
    assert sampler.consumed(taken) == min(n, start + taken * world)


def test_torchs_generator_is_not_drawn_from() -> None:
    before = torch.get_rng_state()
    list(EpochSampler(100))
    assert torch.equal(torch.get_rng_state(), before)


def test_indices_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_core.data.sampler._BLOCK_NUMEL", 4)
    assert list(EpochSampler(11, shuffle=False)) == list(range(11))
    assert all(type(index) is int for index in EpochSampler(11))


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2)])
def test_a_rank_outside_the_world(rank: int, world: int) -> None:
    with pytest.raises(DataError, match=rf"(?s)data-parallel rank {rank} of {world}.*0 to {world - 1}"):
        EpochSampler(5, dp_world_size=world, dp_rank=rank)


class _Epochs:
    """A caller's sampler: 6 indices of this rank, which begin at the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> object:
        return iter(range(self.epoch, self.epoch + 6))

    def __len__(self) -> int:
        return 6


def test_a_foreign_sampler_goes_on_from_a_position() -> None:
    sampler = ForeignSampler(_Epochs(), dp_world_size=2)
    sampler.set_position(epoch=10, start=4)
    assert list(sampler) == [12, 13, 14, 15]
    assert [sampler.consumed(taken) for taken in (0, 1, 4, 9)] == [4, 6, 12, 12]


def test_a_foreign_sampler_without_length_or_epoch() -> None:
    sampler = ForeignSampler((index for index in range(5)), dp_world_size=1)
    sampler.set_position(epoch=1, start=2)
    assert sampler.consumed(3) == 5
    assert list(sampler) == [2, 3, 4]


def test_a_foreign_position_is_rounded_down_to_whole_turns() -> None:
    sampler = ForeignSampler(range(6), dp_world_size=4)
    sampler.set_position(0, 7)
    assert list(sampler) == [1, 2, 3, 4, 5]
    assert sampler.consumed(0) == 4
