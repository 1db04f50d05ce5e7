"""Layouts: every element has one owner, and nothing is lost or doubled. Any sizes, any world up to 64."""

from __future__ import annotations

from functools import partial
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_core.interfaces.logical import Chunk, overlaps
from ds_zero.layout import cut, whole, whole_each

numels = st.lists(st.one_of(st.just(0), st.integers(1, 40), st.integers(1, 5000)), min_size=1, max_size=30)
any_numels = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 2**48)), max_size=30)
shapes = st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=1, max_size=4)
worlds = st.integers(1, 64)
quick = settings(deadline=None, max_examples=200)


@pytest.mark.parametrize("lay", [cut, whole, "whole beside others"])
@quick
@given(numels=any_numels, world_size=worlds, align=st.sampled_from([1, 2, 8]), data=st.data())
def test_every_element_has_one_owner(lay, numels, world_size, align, data):
    if not callable(lay):
        load = data.draw(st.lists(st.integers(0, 2**48), min_size=world_size, max_size=world_size))
        lay = partial(whole, load=load)
    layout = lay(numels, world_size, align=align)
    assert layout.segment % align == 0
    assert layout.total >= sum(numels)
    taken: list[tuple[int, int]] = []
    for index, numel in enumerate(numels):
        shares = [layout.share(index, rank) for rank in range(world_size)]
        intervals = sorted((share.start, share.length) for share in shares if share.length)
        at = 0
        for start, length in intervals:
            assert start == at
            at += length
        assert at == numel
        for rank, share in enumerate(shares):
            assert 0 <= share.at <= share.at + share.length <= layout.segment
            if share.length:
                # Where the share lies in the segment is where the parameter lies in the whole.
                assert rank * layout.segment + share.at == layout.offsets[index] + share.start
                taken.append((rank * layout.segment + share.at, share.length))
        owner = layout.owner(index)
        assert 0 <= owner < world_size
        assert not numel or (shares[owner].length and shares[owner].start == 0)
    taken += [(low, high - low) for low, high in layout.gaps()]
    at = 0
    for start, length in sorted(taken):
        assert start == at, "parameters and gaps cover the whole, each place once"
        at += length
    assert at == layout.total


@quick
@given(numels=numels, world_size=worlds)
def test_cut_wastes_less_than_an_element_per_rank(numels, world_size):
    layout = cut(numels, world_size)
    assert layout.total - sum(numels) < world_size


@quick
@given(numels=numels, world_size=worlds)
def test_whole_parameters_have_one_rank(numels, world_size):
    layout = whole(numels, world_size)
    for index, numel in enumerate(numels):
        lengths = [layout.share(index, rank).length for rank in range(world_size)]
        assert sorted(lengths)[-1] == numel
        assert sum(1 for length in lengths if length) == (1 if numel else 0)
    # Graham 1969: within 4/3 of the best there can be.
    best = max(max(numels), -(-sum(numels) // world_size))
    assert layout.segment <= 4 / 3 * best + 1


@quick
@given(buckets=st.lists(numels, max_size=12), world_size=worlds)
def test_whole_parameters_are_balanced_over_all_buckets(buckets, world_size):
    layouts = whole_each(buckets, world_size)
    load = [0] * world_size
    for layout, given_numels in zip(layouts, buckets, strict=True):
        assert layout.numels == tuple(given_numels)
        # As full as the bucket alone would be.
        assert layout.segment == whole(given_numels, world_size).segment
        for index, numel in enumerate(given_numels):
            load[layout.owner(index)] += numel
    # The most to the rank with the least: ranks differ by no more than one segment.
    assert max(load) - min(load) <= max((layout.segment for layout in layouts), default=0)


@quick
@given(numels=numels, world_size=worlds, lay=st.sampled_from([cut, whole]))
def test_scattered_and_gathered_is_what_it_was(numels, world_size, lay):
    layout = lay(numels, world_size)
    params = [[(index, element) for element in range(numel)] for index, numel in enumerate(numels)]
    flat: list[object] = [None] * layout.total
    for param, offset in zip(params, layout.offsets, strict=True):
        flat[offset : offset + len(param)] = param
    segments = [flat[rank * layout.segment : (rank + 1) * layout.segment] for rank in range(world_size)]
    again: list[list[object]] = [[None] * numel for numel in numels]
    for rank, segment in enumerate(segments):
        for index in range(len(numels)):
            share = layout.share(index, rank)
            again[index][share.start : share.start + share.length] = segment[share.at : share.at + share.length]
    assert again == params


@settings(deadline=None, max_examples=100)
@given(
    shapes=shapes,
    before=st.tuples(worlds, st.sampled_from([cut, whole]), st.sampled_from([1, 8])),
    after=st.tuples(worlds, st.sampled_from([cut, whole]), st.sampled_from([1, 8])),
)
def test_bits_move_from_any_layout_to_any_other(shapes, before, after):
    """Put into the segments of one world, read by another as a checkpoint is, gathered there: every bit is there."""
    # Any 32 bits, so also NaN of every kind and -0.0, which a sum or a comparison of numbers would lose.
    generator = torch.Generator().manual_seed(7)
    params = [
        torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator).view(torch.float32)
        for shape in shapes
    ]
    numels = [prod(shape) for shape in shapes]
    (world_size, lay, align), (other_size, other_lay, other_align) = before, after
    old, new = lay(numels, world_size, align=align), other_lay(numels, other_size, align=other_align)
    flat = torch.zeros(old.total)
    for param, offset in zip(params, old.offsets, strict=True):
        flat[offset : offset + param.numel()] = param.view(-1)
    read = torch.full((new.total,), float("nan"))
    for index, shape in enumerate(shapes):
        box = Chunk.whole(shape).box
        for rank, other in ((r, o) for r in range(world_size) for o in range(other_size)):
            mine, theirs = old.share(index, rank), new.share(index, other)
            if not (mine.length and theirs.length):
                continue
            source = flat[rank * old.segment + mine.at :][: mine.length]
            target = read[other * new.segment + theirs.at :][: theirs.length]
            chunks = (Chunk(box, mine.start, mine.length), Chunk(box, theirs.start, theirs.length))
            for overlap in overlaps(*chunks):
                from_, to = (
                    data[span.offset : span.offset + span.box.numel].view(span.box.size)
                    for data, span in ((source, overlap.source), (target, overlap.target))
                )
                to[overlap.target_slices] = from_[overlap.source_slices]
    for param, offset in zip(params, new.offsets, strict=True):
        gathered = read[offset : offset + param.numel()].view(param.shape)
        assert torch.equal(gathered.view(torch.int32), param.view(torch.int32))
