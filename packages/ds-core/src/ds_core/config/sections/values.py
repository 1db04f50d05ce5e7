"""Types that several sections share: a union that fails with one message, ``"auto"`` as a value, patterns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError, core_schema

from ds_core.config.section import Number, PositiveInt

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler

__all__ = ["AutoCount", "AutoNumber", "OneOf", "OrSwitch", "Pattern", "compilable"]


@dataclass(frozen=True)
class OneOf:
    """Marks a union: what fits no member of it is one problem, not one per member.

    ::

        Annotated[str | dict[str, Any], OneOf("must be text or an object")]
    """

    expected: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.custom_error_schema(handler(source), "one_of", custom_error_message=self.expected)


class OrSwitch:
    """Marks a section with a key ``enabled``: ``true`` and ``false`` stand for ``{"enabled": ...}``."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self.section, handler(source))

    @staticmethod
    def section(value: Any) -> Any:
        """Return ``true`` and ``false`` as the section they stand for, anything else as it is."""
        return {"enabled": value} if isinstance(value, bool) else value


AutoCount = Annotated[PositiveInt | Literal["auto"], OneOf('must be a whole number from 1, or "auto"')]
"""A whole number from 1, or ``"auto"`` where that is the default."""
AutoNumber = Annotated[Number | Literal["auto"], OneOf('must be a finite number, or "auto"')]
"""A finite number, or ``"auto"`` where that is the default."""


def compilable(pattern: str) -> str:
    """Return ``pattern`` if Python's ``re`` takes it."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise PydanticCustomError(
            "pattern", "must be a regular expression ({why})", {"why": str(error)[:100]}
        ) from error
    return pattern


Pattern = Annotated[str, AfterValidator(compilable)]
"""A regular expression of Python's ``re``."""
