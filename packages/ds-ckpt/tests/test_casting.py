"""Casting with numpy gives torch's bits, for every pattern of bits that there is or that chance finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_ckpt.casting import BITS, TARGETS, cast, is_floating
from ds_ckpt.exporting import as_torch

FLOATING = [word for word in BITS if is_floating(word)]
NARROW = [word for word in FLOATING if getattr(torch, word).itemsize <= 2]
BEYOND = {"float32": 1e39, "bfloat16": 3.4e38, "float16": 65520.0}


def same(values: np.ndarray, source: str, target: str) -> None:
    """Compare a cast with torch's: the same bits, and NaN for NaN, of which torch's own kernels make different ones."""
    given_values = values.copy()
    found, _ = cast(values, source, target)
    np.testing.assert_array_equal(values.view("u1"), given_values.view("u1"))
    mine = as_torch(found, target, (len(values),))
    expected = as_torch(given_values, source, (len(values),)).to(getattr(torch, target))
    assert mine.dtype == expected.dtype
    assert torch.equal(mine.isnan(), expected.isnan())
    bits = getattr(torch, f"int{8 * mine.element_size()}")
    keep = ~mine.isnan()
    assert torch.equal(mine[keep].view(bits), expected[keep].view(bits))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", NARROW)
def test_every_value_of_a_narrow_dtype(source, target):
    size = getattr(torch, source).itemsize
    same(np.arange(2 ** (8 * size), dtype=f"<u{size}").view(BITS[source]), source, target)


@pytest.mark.parametrize("target", TARGETS)
def test_float32_around_every_bfloat16_and_float16(target):
    """Ties, the values beside them, subnormal ones, and those that round to infinity."""
    upper = np.arange(2**16, dtype="<u4") << 16
    lower = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], "<u4")
    same((upper[:, None] | lower).reshape(-1).view("<f4"), "float32", target)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50), st.sampled_from(TARGETS))
def test_any_float64(patterns, target):
    same(np.array(patterns, "<u8").view("<f8"), "float64", target)


@given(st.lists(st.floats(width=64), max_size=50), st.sampled_from(["float32", "float64"]), st.sampled_from(TARGETS))
def test_numbers_that_people_write(numbers, source, target):
    with np.errstate(over="ignore"):
        same(np.array(numbers).astype(BITS[source]), source, target)


@pytest.mark.parametrize("target", TARGETS)
def test_a_nan_stays_one_and_keeps_its_sign(target):
    patterns = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F807FFF], "<u4")
    found, is_beyond = cast(patterns.view("<f4"), "float32", target)
    result = as_torch(found, target, (6,))
    assert result.isnan().all()
    assert not is_beyond
    if target == "bfloat16":
        assert [int(bits) >> 15 for bits in found] == [0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("source", "target"),
    [*(("float64", target) for target in TARGETS), ("float32", "bfloat16"), ("float32", "float16")],
)
def test_finite_values_that_become_infinite_are_told(source, target):
    beyond = np.array([1.0, BEYOND[target]], BITS[source])
    found, is_beyond = cast(beyond, source, target)
    assert is_beyond is True
    assert as_torch(found, target, (2,))[1] == float("inf")
    # What was infinite before is nothing to tell.
    assert cast(np.array([np.inf, -np.inf, 1.0], BITS[source]), source, target)[1] is False


def test_a_cast_to_itself_is_no_copy():
    values = np.ones(3, "<u2")
    assert cast(values, "bfloat16", "bfloat16")[0] is values


def test_what_is_cast_at_all():
    assert {word for word in BITS if is_floating(word)} == {
        word for word in BITS if getattr(torch, word).is_floating_point
    }
    assert {word: np.dtype(bits).itemsize for word, bits in BITS.items()} == {
        word: getattr(torch, word).itemsize for word in BITS
    }
