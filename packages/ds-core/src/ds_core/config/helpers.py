"""What tools around DeepSpeed take from its ``config_utils``: a mutable base model, and helpers for plain dicts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from ds_core.config.section import is_auto
from ds_core.config.showing import printable
from ds_core.errors import ConfigError, nearest
from ds_core.log import logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pydantic.fields import FieldInfo

__all__ = [
    "DeepSpeedConfigModel",
    "DeepSpeedConfigObject",
    "ScientificNotationEncoder",
    "dict_raise_error_on_duplicate_keys",
    "get_config_default",
    "get_dict_param",
    "get_list_param",
    "get_scalar_param",
    "pp_int",
]


class DeepSpeedConfigModel(BaseModel):
    """Base of configuration classes that others wrote for DeepSpeed; ours derive from :class:`ds_core.config.Section`.

    Two bases, because they promise different things: values of a ``Section`` are frozen, so what was checked once
    holds; code written for DeepSpeed assigns to its models after they were built. Here unknown keys are errors,
    ``"auto"`` means the default, a field may be given by name or alias, and every assignment is validated.

    A deprecated field says so in its ``json_schema_extra``: ``deprecated`` (true), ``deprecated_msg``, ``new_param``
    (the replacement, a dotted path), ``set_new_param`` (false: only warn), ``new_param_fn`` (old value -> new value).
    Using it logs a warning and moves its value to the replacement; the old attribute is gone then.

    Args:
        strict: take ``"auto"`` as it is.
        data: the fields.

    Raises:
        pydantic.ValidationError: a key is unknown, or a value wrong.
        ConfigError: a deprecated field and its replacement are both given. In a nested model pydantic makes it one
            of the problems of its ``ValidationError``.

    >>> class Tiles(DeepSpeedConfigModel):
    ...     tile_size: int = 8
    >>> tiles = Tiles(tile_size="auto")
    >>> tiles.tile_size = 2e1
    >>> tiles
    Tiles(tile_size=20)
    """

    model_config = ConfigDict(
        extra="forbid",
        validate_default=True,
        validate_assignment=True,
        populate_by_name=True,
        use_enum_values=True,
        arbitrary_types_allowed=True,
        defer_build=True,
        protected_namespaces=(),
    )

    def __init__(self, strict: bool = False, **data: Any) -> None:
        # pydantic calls this for nested models as well, so the rules below hold at every depth.
        super().__init__(**(data if strict else self._without_auto(data)))
        for name in _deprecated_fields(type(self)) & self.model_fields_set:
            _replace(self, name, may_overwrite=False)

    @classmethod
    def _without_auto(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        infos: dict[str, FieldInfo] = {}
        for name, info in cls.model_fields.items():
            infos |= dict.fromkeys((name, *_aliases(info)), info)
        return {name: value for name, value in data.items() if not is_auto(value, infos.get(name))}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _deprecated_fields(type(self)):
            _replace(self, name, may_overwrite=True)


def _aliases(info: FieldInfo) -> list[str]:
    alias = info.validation_alias
    choices = getattr(alias, "choices", [alias])
    return [choice for choice in choices if isinstance(choice, str)]


def _deprecated_fields(model: type[BaseModel]) -> set[str]:
    return {name for name, info in model.model_fields.items() if _extra(info).get("deprecated")}


def _extra(info: FieldInfo) -> Mapping[str, Any]:
    return info.json_schema_extra if isinstance(info.json_schema_extra, Mapping) else {}


def _replace(model: BaseModel, name: str, *, may_overwrite: bool) -> None:
    """Warn that field ``name`` of ``model`` is deprecated, and move its value to the replacement where it has one.

    Args:
        model: the model that holds the field.
        name: the deprecated field.
        may_overwrite: whether a replacement that was given too gives way: the later of two assignments counts.
    """
    extra = _extra(type(model).model_fields[name])
    where, new = type(model).__name__, extra.get("new_param", "")
    instead = f"; use {new} instead" if new else ""
    message = f": {extra['deprecated_msg']}" if extra.get("deprecated_msg") else ""
    logger.warning("%s: %s is deprecated%s%s", where, name, instead, message)
    if not new or not extra.get("set_new_param", True):
        return
    holder: Any = model
    *parents, last = new.split(".")
    for parent in parents:
        holder = getattr(holder, parent)
    if holder is None:
        raise ConfigError(
            f"{name} is deprecated, and {'.'.join(parents)}, which holds its replacement, is not given",
            where=where,
            fix=f"give {new} instead",
        )
    if last in holder.model_fields_set and not may_overwrite:
        raise ConfigError(
            f"{name}, which is deprecated, and its replacement {new} are both given", where=where, fix=f"remove {name}"
        )
    convert = extra.get("new_param_fn", lambda value: value)
    setattr(holder, last, convert(getattr(model, name)))
    delattr(model, name)
    model.model_fields_set.discard(name)


def get_config_default(config: type[BaseModel], field_name: str) -> Any:
    """Return the default of a field of ``config``, a class.

    Raises:
        ConfigError: there is no such field, or it has no default.

    >>> from ds_core.config import ZeroSection
    >>> get_config_default(ZeroSection, "stage")
    0
    """
    info = config.model_fields.get(field_name)
    if info is None:
        close = nearest(field_name, config.model_fields)
        raise ConfigError(
            f"{config.__name__} has no field {field_name!r}",
            where="get_config_default",
            fix=f"did you mean {close!r}?" if close else f"fields are {', '.join(config.model_fields)}",
        )
    if info.is_required():
        raise ConfigError(
            f"{config.__name__}.{field_name} must be given, so it has no default", where="get_config_default"
        )
    return info.get_default(call_default_factory=True)


def get_scalar_param(param_dict: Mapping[str, Any], param_name: str, param_default_value: Any) -> Any:
    """Return ``param_dict[param_name]``, or the default where it is not given; ``get_list_param`` and the like are it.

    >>> get_scalar_param({"depth": 3}, "depth", 1), get_scalar_param({}, "depth", 1)
    (3, 1)
    """
    return param_dict.get(param_name, param_default_value)


get_list_param = get_scalar_param
get_dict_param = get_scalar_param


class pp_int(int):  # noqa: N801 - DeepSpeed's name
    """An int that prints with commas, or as ``custom_print_str``.

    >>> pp_int(5e8), pp_int(2**63 - 1, "sys.maxsize"), pp_int(2) + 1
    (500,000,000, sys.maxsize, 3)
    """

    custom_print_str: str | None

    def __new__(cls, val: Any, custom_print_str: str | None = None) -> pp_int:
        number = super().__new__(cls, val)
        number.custom_print_str = custom_print_str
        return number

    def __repr__(self) -> str:
        return self.custom_print_str or f"{int(self):,}"

    __str__ = __repr__


class ScientificNotationEncoder(json.JSONEncoder):
    """A JSON encoder that writes numbers beyond 1000 in scientific notation, with all their digits.

    >>> print(json.dumps({"reduce_bucket_size": 500000000, "stage": 2}, cls=ScientificNotationEncoder))
    {"reduce_bucket_size": 5e+8, "stage": 2}
    """

    def encode(self, o: Any) -> str:
        """Return the JSON of ``o``."""
        return "".join(self.iterencode(o))

    def iterencode(self, o: Any, _one_shot: bool = False) -> Iterator[str]:
        """Yield the JSON of ``o`` in pieces."""
        return self._pieces(o, 0)

    def _pieces(self, value: Any, depth: int) -> Iterator[str]:
        if isinstance(value, dict):
            items = sorted(value.items()) if self.sort_keys else value.items()
            members = [
                [self._scalar(self._key(name)), self.key_separator, *self._pieces(item, depth + 1)]
                for name, item in items
            ]
            yield from self._joined("{", members, "}", depth)
        elif isinstance(value, (list, tuple)):
            yield from self._joined("[", [list(self._pieces(item, depth + 1)) for item in value], "]", depth)
        elif value is None or isinstance(value, (str, int, float)):
            yield self._scalar(value)
        else:
            yield from self._pieces(self.default(value), depth)

    def _joined(self, opening: str, members: list[list[str]], closing: str, depth: int) -> Iterator[str]:
        indent = " " * self.indent if isinstance(self.indent, int) else self.indent
        line, last = ("", "") if indent is None else (f"\n{indent * (depth + 1)}", f"\n{indent * depth}")
        yield opening
        for number, member in enumerate(members):
            yield (self.item_separator if number else "") + line
            yield from member
        yield (last if members else "") + closing

    def _key(self, name: Any) -> str:
        return name if isinstance(name, str) else json.dumps(name)

    def _scalar(self, value: Any) -> str:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 1000 < abs(value) < math.inf:
            # Through the shortest text of the number: rounding to six digits would change what a reader loads.
            plain = int.__repr__(value) if isinstance(value, int) else float.__repr__(value)
            return f"{Decimal(plain).normalize():e}"
        return super().encode(value) if isinstance(value, str) else json.dumps(value, allow_nan=self.allow_nan)


class DeepSpeedConfigObject:
    """Base of plain objects that print as the JSON of their attributes.

    >>> class Probe(DeepSpeedConfigObject):
    ...     def __init__(self) -> None:
    ...         self.depth = 2
    >>> Probe()
    {
        "depth": 2
    }
    """

    def repr(self) -> dict[str, Any]:
        """Return the attributes."""
        return self.__dict__

    def __repr__(self) -> str:
        return json.dumps(self.__dict__, sort_keys=True, indent=4, cls=_ObjectEncoder)


class _ObjectEncoder(ScientificNotationEncoder):
    """Writes what is no JSON as text, so that any object can be printed."""

    def default(self, o: Any) -> Any:
        return o.__dict__ if isinstance(o, DeepSpeedConfigObject) else str(o)


def dict_raise_error_on_duplicate_keys(ordered_pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of one JSON object as a dict: an ``object_pairs_hook`` for ``json.load``.

    Raises:
        ConfigError: a key is there twice; it names all such keys.

    >>> json.loads('{"stage": 1}', object_pairs_hook=dict_raise_error_on_duplicate_keys)
    {'stage': 1}
    """
    pairs = list(ordered_pairs)
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ConfigError(f"keys given twice in one object: {', '.join(map(printable, twice))}", fix="keep one of each")
    return dict(pairs)
