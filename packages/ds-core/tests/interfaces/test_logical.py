"""Chunks against numpy, for any shape and any interval."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_core.interfaces.logical import Box, Chunk, LogicalTensor, overlaps

# The deadline of hypothesis would measure the machine.
anywhere = settings(deadline=None)

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def boxes(draw, shape):
    start, size = [], []
    for extent in shape:
        low = draw(st.integers(0, extent))
        start.append(low)
        size.append(draw(st.integers(0, extent - low)))
    return Box(tuple(start), tuple(size))


@st.composite
def chunks(draw, shape):
    box = draw(boxes(shape) | st.just(Box((0,) * len(shape), shape)))
    begin = draw(st.integers(0, box.numel))
    return Chunk(box, begin, draw(st.integers(0, box.numel - begin)))


@st.composite
def shapes_with_chunks(draw, count):
    shape = draw(shapes)
    return shape, *(draw(chunks(shape)) for _ in range(count))


def cut(array, start, size):
    return array[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))]


def elements(shape, chunk):
    """Return the numbers, in the whole tensor, of a chunk's elements, in the order of its storage."""
    whole = np.arange(math.prod(shape)).reshape(shape)
    return cut(whole, chunk.box.start, chunk.box.size).reshape(-1)[chunk.offset : chunk.offset + chunk.length]


@anywhere
@given(shapes_with_chunks(1))
def test_spans_are_the_interval_in_storage_order(case):
    shape, chunk = case
    whole = np.arange(math.prod(shape)).reshape(shape)
    seen, at = [], 0
    for span in chunk.spans():
        assert span.offset == at
        assert span.box.numel > 0
        assert len(span.box.start) == len(span.box.size) == len(shape)
        part = cut(whole, span.box.start, span.box.size)
        assert part.size == span.box.numel, "inside the tensor"
        seen.append(part.reshape(-1))
        at += span.box.numel
    assert at == chunk.length
    # Equal to the reference in order: so nothing is missing, and nothing is there twice.
    assert np.array_equal(np.concatenate([np.empty(0, dtype=whole.dtype), *seen]), elements(shape, chunk))


@anywhere
@given(shapes_with_chunks(1))
def test_spans_are_few(case):
    shape, chunk = case
    assert len(list(chunk.spans())) <= max(1, 2 * len(shape) - 1)


@anywhere
@given(shapes_with_chunks(2))
def test_overlaps_copy_what_numpy_would(case):
    shape, source, target = case
    from_, to = elements(shape, source), np.full(target.length, -1)
    copied = 0
    for part in overlaps(source, target):
        a, b = part.source, part.target
        block = from_[a.offset : a.offset + a.box.numel].reshape(a.box.size)[part.source_slices]
        view = to[b.offset : b.offset + b.box.numel].reshape(b.box.size)
        assert np.all(view[part.target_slices] == -1), "an element is copied twice"
        view[part.target_slices] = block
        assert block.size == part.numel
        copied += part.numel
    wanted = elements(shape, target)
    assert np.array_equal(to, np.where(np.isin(wanted, from_), wanted, -1))
    assert copied == len(np.intersect1d(wanted, from_))


@anywhere
@given(st.data(), shapes)
def test_a_tensor_cut_anywhere_is_put_together_in_any_other_way(data, shape):
    numel = math.prod(shape)
    box = Box((0,) * len(shape), shape)

    def cuts():
        edges = [0, *sorted(data.draw(st.lists(st.integers(0, numel), max_size=4))), numel]
        return [Chunk(box, low, high - low) for low, high in itertools.pairwise(edges)]

    sources, targets = cuts(), cuts()
    for target in targets:
        assert sum(part.numel for source in sources for part in overlaps(source, target)) == target.length


@anywhere
@given(shapes)
def test_the_whole_is_one_span(shape):
    chunk = Chunk.whole(shape)
    assert chunk.is_whole_box
    assert chunk.length == math.prod(shape)
    spans = list(chunk.spans())
    assert [span.box for span in spans] == ([chunk.box] if chunk.length else [])


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        (Chunk(Box((), ()), 0, 1), [((), (), 0)]),
        (Chunk(Box((), ()), 0, 0), []),
        (Chunk(Box((2, 1), (3, 4)), 2, 7), [((2, 3), (1, 2), 0), ((3, 1), (1, 4), 2), ((4, 1), (1, 1), 6)]),
        (Chunk(Box((0, 0), (3, 4)), 4, 8), [((1, 0), (2, 4), 0)]),
    ],
)
def test_spans_by_hand(chunk, expected):
    assert [(span.box.start, span.box.size, span.offset) for span in chunk.spans()] == expected


def test_numbers_of_elements():
    assert LogicalTensor("a", "weight", (), "float32").numel == 1
    assert LogicalTensor("a", "weight", (3, 0), "float32").numel == 0
    assert LogicalTensor("a", "weight", (3, 4), "float32").numel == Box((0, 0), (3, 4)).numel == 12
    assert not Chunk(Box((0,), (4,)), 1, 3).is_whole_box
