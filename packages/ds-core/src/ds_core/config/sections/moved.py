"""Deprecated keys of a section that are read as a key of one of its sub-sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError, core_schema

from ds_core.config.section import AUTO, Section, show
from ds_core.config.sections.values import OrSwitch

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler

__all__ = ["Moved", "move", "moved"]


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
    result = moved(section, data)[0]
    return {**result, **{old: against for old in result if (against := _contradicted(section, result, old))}}


def moved(section: type[Section], data: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[str, tuple[str, str]]]:
    """Return ``data`` with deprecated keys where they belong, and each that moved -> section and key it moved to.

    A key that is ``"auto"``, or whose replacement is given too with another value, stays where it is.
    """
    result, moves = dict(data), {}
    for old in data:
        marker = _marker(section, old)
        if marker is None or result[old] == AUTO or _contradicted(section, result, old):
            continue
        holder, inner = _holder(section, result, marker)
        value = result.pop(old)
        if value is None:
            continue  # not given
        if inner is not None:  # else what stands there is no section, and that is the problem to tell
            new = _written(_class_of(section, marker), inner, marker.key) or marker.key
            result[holder] = {**inner, new: value}
            moves[old] = (holder, new)
    return result, moves


def _contradicted(section: type[Section], data: Mapping[Any, Any], old: Any) -> _Contradiction | None:
    marker = _marker(section, old)
    if marker is None or data[old] is None or data[old] == AUTO:
        return None
    holder, inner = _holder(section, data, marker)
    new = _written(_class_of(section, marker), inner or {}, marker.key)
    if new is None or inner is None or inner[new] in (AUTO, data[old]):
        return None
    return _Contradiction(f"{holder}.{new}", inner[new])


def _marker(section: type[Section], name: Any) -> Moved | None:
    field = section.fields_by_key().get(name)
    metadata = section.model_fields[field].metadata if field else []
    return next((item for item in metadata if isinstance(item, Moved)), None)


def _class_of(section: type[Section], marker: Moved) -> type[Section]:
    found = section.model_fields[marker.section].annotation
    assert isinstance(found, type)
    assert issubclass(found, Section)
    return found


def _holder(section: type[Section], data: Mapping[Any, Any], marker: Moved) -> tuple[str, Mapping[Any, Any] | None]:
    """Return the key that holds the sub-section, and what it holds; None where that is no section."""
    name = _written(section, data, marker.section) or marker.section
    inner = OrSwitch.section(data.get(name, {}))
    if isinstance(inner, Section):
        inner = {field: getattr(inner, field) for field in inner.model_fields_set}
    return name, inner if isinstance(inner, Mapping) else None


def _written(section: type[Section], data: Mapping[Any, Any], field: str) -> str | None:
    """Return the key of ``data`` that sets ``field``, if there is one."""
    return next((name for name, sets in section.fields_by_key().items() if sets == field and name in data), None)
