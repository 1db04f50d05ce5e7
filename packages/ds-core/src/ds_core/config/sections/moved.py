"""Deprecated keys of a section that are read as a key of one of its sub-sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError, core_schema

from ds_core.config.section import AUTO, Section, show

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue

__all__ = ["Moved", "move"]


@dataclass(frozen=True)
class Moved:
    """Marks a deprecated key: :func:`move`, called in the section's ``prepare``, reads it as ``section.key``::

    mp_size: Annotated[PositiveInt, Moved("tensor_parallel", "tp_size")] = 1
    """

    section: str
    """Field of the same class that is a section."""
    key: str
    """Field of that section."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(_refuse, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {**handler(schema), "deprecated": True}


@dataclass(frozen=True)
class _Contradiction:
    """The value of a deprecated key whose replacement says something else."""

    replacement: str
    says: Any


def _refuse(value: Any) -> Any:
    if isinstance(value, _Contradiction):
        raise PydanticCustomError(
            "contradiction",
            'but its replacement, "{replacement}", is {says}',
            {"replacement": value.replacement, "says": show(value.says)},
        )
    return value


def move(section: type[Section], data: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return ``data`` with the deprecated keys of ``section`` (:class:`Moved`) where they belong today.

    A key whose replacement is given too, with another value, stays where it is and does not validate.
    """
    result = dict(data)
    for name, field in section.fields_by_key().items():
        marker = next((item for item in section.model_fields[field].metadata if isinstance(item, Moved)), None)
        if marker is not None and name in result:
            _move(section, result, name, marker)
    return result


def _move(section: type[Section], result: dict[Any, Any], old: str, marker: Moved) -> None:
    if result[old] is None and section.model_fields[section.fields_by_key()[old]].default is None:
        del result[old]  # not given
        return
    written = _written(section, result, marker.section) or marker.section
    inner_class = section.model_fields[marker.section].annotation
    assert isinstance(inner_class, type)
    assert issubclass(inner_class, Section)
    inner = result.get(written, {})
    if isinstance(inner, Section):
        inner = {name: getattr(inner, name) for name in inner.model_fields_set}
    if not isinstance(inner, Mapping):
        del result[old]  # what stands there is no section, and that is the problem to tell
        return
    new = _written(inner_class, inner, marker.key)
    if new is not None and inner[new] not in (AUTO, result[old]):
        result[old] = _Contradiction(f"{written}.{new}", inner[new])
        return
    result[written] = {**inner, new or marker.key: result.pop(old)}


def _written(section: type[Section], data: Mapping[Any, Any], field: str) -> str | None:
    """Return the key of ``data`` that sets ``field``, if there is one."""
    return next((name for name, sets in section.fields_by_key().items() if sets == field and name in data), None)
