"""Floating dtypes into each other with numpy, rounded to nearest, ties to even, as torch does. Loads no torch.

numpy has no bfloat16 and no 8-bit floats: their elements are held as unsigned integers of the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BITS", "TARGETS", "Array", "cast", "is_floating"]

Array = NDArray[Any]

BITS = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "float8_e4m3fn": "|u1",
    "float8_e5m2": "|u1",
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "|i1",
    "uint64": "<u8",
    "uint32": "<u4",
    "uint16": "<u2",
    "uint8": "|u1",
    "bool": "|b1",
    "complex64": "<c8",
    "complex128": "<c16",
}
"""torch's word of a dtype -> numpy's of the elements, or of integers of the same bits."""
TARGETS = ("float32", "bfloat16", "float16")
"""What can be cast to."""


def is_floating(dtype: str) -> bool:
    """Return whether a dtype, by torch's word, is cast at all: not integers, booleans and complex numbers.

    >>> is_floating("bfloat16"), is_floating("int64")
    (True, False)
    """
    return dtype.startswith(("float", "bfloat"))


def cast(values: Array, source: str, target: str) -> tuple[Array, bool]:
    """Return ``values`` in another dtype.

    Args:
        values: in the form of :data:`BITS`; not written to.
        source: torch's word of their dtype, a floating one.
        target: one of :data:`TARGETS`.

    Returns:
        The elements in the form of :data:`BITS`, themselves where the dtypes are equal; and whether a finite one is
        beyond what ``target`` holds, and infinite now.
    """
    if source == target:
        return values, False
    # Overflow to infinity is what rounding does; it is told by the result.
    with np.errstate(over="ignore", invalid="ignore"):
        wide = _to_float32(values, source)
        found = {"float32": lambda: wide, "bfloat16": lambda: _to_bfloat16(wide), "float16": lambda: wide.astype("<f2")}
        result = found[target]()
    return result, _infinities(result, target) > _infinities(values, source)


def _to_float32(values: Array, source: str) -> Array:
    """Return the values in float32: exact, but for float64, which is rounded to it first, as torch does."""
    if source == "bfloat16":
        return (values.astype("<u4") << 16).view("<f4")
    if source == "float8_e5m2":  # float16 without its last 8 bits
        return (values.astype("<u2") << 8).view("<f2").astype("<f4")
    if source == "float8_e4m3fn":
        found: Array = _E4M3[values]
        return found
    return values.astype("<f4")


def _to_bfloat16(values: Array) -> Array:
    bits = values.view("<u4")
    # To the upper half, ties to the even one: adds just under half of the last place kept, and that place.
    rounded: Array = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype("<u2")
    # A NaN whose digits are all in the lower half would become infinite, or carry into the sign.
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if is_nan.any():
        rounded[is_nan] = ((bits[is_nan] >> 16) | 0x0040).astype("<u2")
    return rounded


def _infinities(values: Array, dtype: str) -> int:
    if dtype == "bfloat16":
        return int(np.count_nonzero((values & 0x7FFF) == 0x7F80))
    if dtype == "float8_e5m2":
        return int(np.count_nonzero((values & 0x7F) == 0x7C))
    return 0 if dtype == "float8_e4m3fn" else int(np.count_nonzero(np.isinf(values)))


def _e4m3_table() -> Array:
    """Return the 256 values of float8_e4m3fn: sign, 4 bits of exponent, 3 of fraction; no infinity."""
    codes = np.arange(256)
    sign, exponent, fraction = np.where(codes & 0x80, -1.0, 1.0), (codes >> 3) & 0xF, codes & 7
    size = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7))
    size[(codes & 0x7F) == 0x7F] = np.nan
    return (sign * size).astype("<f4")


_E4M3 = _e4m3_table()
