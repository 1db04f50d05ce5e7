"""Types of the arguments of optimizers and schedules, as strict as their constructors.

The values are passed on as they were written, so text is no number: a constructor would get ``"1e-3"`` as it stands.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from ds_core.config.section import Section

__all__ = ["Arguments", "Betas", "Flag", "PerGroup", "Rate", "Real", "Share", "StepCount", "Steps", "whole"]


NO_QUOTES = ", not in quotes"


class Arguments(Section):
    """Base of the arguments of one constructor. Null is no way to leave one out: the constructor would get it."""

    @classmethod
    def is_left_out(cls, key: Any, value: Any) -> bool:
        return value is not None and super().is_left_out(key, value)


def _real(value: Any) -> float:
    number = _as_float(value)
    if number is None:
        raise PydanticCustomError("number", "must be a finite number" + (NO_QUOTES if isinstance(value, str) else ""))
    return number


def _as_float(value: Any) -> float | None:
    # bool is an int in Python, and float() reads text; neither is meant as a number.
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):  # 10**400; a tensor with several elements
        return None
    return number if math.isfinite(number) else None


def _is_whole_float(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def whole(value: Any) -> int:
    """Return ``value`` if it is an int; 4.0 and "4" are none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        why = NO_QUOTES if isinstance(value, str) else ", without a point" if _is_whole_float(value) else ""
        raise PydanticCustomError("whole_number", "must be a whole number" + why)
    return int(value)


def _flag(value: Any) -> Any:
    if isinstance(value, str):  # "false" is true to a constructor
        raise PydanticCustomError("flag", "must be true or false, not in quotes")
    return value


def _pair(value: Any) -> tuple[float, float]:
    numbers = [_as_float(item) for item in value] if isinstance(value, (list, tuple)) else []
    if len(numbers) != 2 or not all(number is not None and 0 <= number < 1 for number in numbers):
        raise PydanticCustomError("betas", "must be a list of two numbers from 0 to below 1")
    first, second = numbers
    return first, second  # type: ignore[return-value] # neither is None


def _for_groups(value: Any) -> float | tuple[float, ...]:
    numbers = [_as_float(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    if not numbers or None in numbers:
        why = NO_QUOTES if isinstance(value, str) else ""
        raise PydanticCustomError("per_group", f"must be a finite number{why}, or a list of one per parameter group")
    found = tuple(number for number in numbers if number is not None)
    return found if isinstance(value, (list, tuple)) else found[0]


Real = Annotated[float, BeforeValidator(_real)]
"""A finite number."""
Rate = Annotated[float, Field(ge=0), BeforeValidator(_real)]
"""A finite number from 0."""
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_real)]
"""A number from 0 to 1."""
Steps = Annotated[int, Field(ge=1), BeforeValidator(whole)]
"""A whole number from 1."""
StepCount = Annotated[int, Field(ge=0), BeforeValidator(whole)]
"""A whole number from 0."""
Flag = Annotated[bool, BeforeValidator(_flag)]
"""True or false."""
Betas = Annotated[tuple[float, float], BeforeValidator(_pair)]
"""Two numbers from 0 to below 1."""
PerGroup = Annotated[float | tuple[float, ...], BeforeValidator(_for_groups)]
"""A number for all parameter groups, or a list of one per group."""
