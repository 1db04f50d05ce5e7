"""Types of numbers in a section: text and floats count as the numbers they are, truth values do not."""

from __future__ import annotations

import sys
from numbers import Integral
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

__all__ = ["Count", "Fraction", "Int", "Number", "PositiveInt", "as_whole"]


def as_whole(value: Any) -> int | None:
    """Return the whole number that ``value`` is, None where it is none.

    >>> as_whole(5e8), as_whole("2"), as_whole(2.5), as_whole(True), as_whole(float("inf"))
    (500000000, 2, None, None, None)
    """
    number = _number(value)
    if number is None or (isinstance(number, float) and not number.is_integer()):  # False for inf and nan too
        return None
    return int(number)


def _whole(value: Any) -> int:
    number = as_whole(value)
    if number is None:
        raise PydanticCustomError("whole_number", "must be a whole number")
    return number


def _finite(value: Any) -> float:
    number = _number(value)
    # math.isfinite would raise for an int that no float can hold; False for inf and nan too.
    if number is None or not -sys.float_info.max <= number <= sys.float_info.max:
        raise PydanticCustomError("number", "must be a finite number")
    return float(number)


def _number(value: Any) -> int | float | None:
    # bool is an int in Python, but "gradient_clipping": true is a mistake.
    if not isinstance(value, bool):
        if isinstance(value, (int, float)):
            return value
        if isinstance(value, str):
            return _parsed(value)
        if isinstance(value, Integral):  # numpy's
            return int(value)
        if hasattr(value, "__float__"):  # numpy's float32, a tensor with one element
            return float(value)
    return None


def _parsed(text: str) -> int | float | None:
    for parse in (int, float):
        try:
            return parse(text)
        except ValueError:
            continue
    return None


Int = Annotated[int, BeforeValidator(_whole)]
"""Any whole number; ``5e8`` and ``"2"`` are whole, ``true`` is not a number."""
Count = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
"""A whole number from 0."""
PositiveInt = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
"""A whole number from 1."""
Number = Annotated[float, BeforeValidator(_finite)]
"""A finite number."""
Fraction = Annotated[Number, Field(ge=0, le=1)]
"""A number from 0 to 1."""
