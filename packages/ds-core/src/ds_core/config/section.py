"""What every configuration section is made of: :class:`Section`, its number types, and the marker for unbuilt keys."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from numbers import Integral
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import GetCoreSchemaHandler
    from pydantic.fields import FieldInfo

    from ds_core.config.config import Config

__all__ = [
    "AUTO",
    "Count",
    "DtypeName",
    "Fraction",
    "Int",
    "NoEffect",
    "NotBuilt",
    "Number",
    "PositiveInt",
    "Section",
    "is_auto",
    "key",
    "lowered",
    "show",
]

AUTO = "auto"
"""The value that means "the default" wherever there is one."""


def is_auto(value: Any, field: FieldInfo | None) -> bool:
    """Return whether ``value`` stands for the default of ``field``: it is ``"auto"``, and there is a default."""
    return isinstance(value, str) and value == AUTO and field is not None and not field.is_required()


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are frozen, ``"auto"`` means the default.

    A key may be written by its field name or by an alias, but not by both at once. The docstring under a field is its
    description (:meth:`descriptions`).

    >>> class Limits(Section):
    ...     bucket_numel: Count = key("bucket_size", default=8)
    >>> Limits.model_validate({"bucket_size": "5e3"}).bucket_numel
    5000
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        populate_by_name=True,
        defer_build=True,  # validators are built on first use: an import that checks nothing should cost nothing
        protected_namespaces=(),
    )

    _field_of_key: ClassVar[dict[str, str]] = {}

    source: ClassVar[str] = ""
    """Where the facts of the section stand, such as ``spec/core.md 2.5``, or the promise that it keeps."""
    comes_with: ClassVar[str] = ""
    """The package that will carry the section out; empty where it is carried out already. Refused until then if on."""
    no_effect: ClassVar[str] = ""
    """Why the section changes nothing even if it is on, where that is so: ``engine.report()`` says it."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls._field_of_key = {}
        for name, info in cls.model_fields.items():
            alias = info.validation_alias
            for choice in alias.choices if isinstance(alias, AliasChoices) else [alias or name]:
                cls._field_of_key[str(choice)] = name
            cls._field_of_key[name] = name

    @classmethod
    def fields_by_key(cls) -> Mapping[str, str]:
        """Return every key a user may write -> the field it sets."""
        return cls._field_of_key

    @classmethod
    def descriptions(cls) -> Mapping[str, str]:
        """Return the docstring under each field, by field name.

        Read from the source on demand: pydantic's ``use_attribute_docstrings`` does it at import, for a third of the
        50 ms that the import may take.
        """
        found: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            if base is not Section and issubclass(base, Section):
                found |= _docstrings(base)
        return {name: found[name] for name in cls.model_fields if name in found}

    def is_on(self) -> bool:
        """Return whether the section asks for something: its ``enabled``, or else any key away from its default.

        >>> class Probe(Section):
        ...     depth: Count = 2
        >>> Probe(depth=2).is_on(), Probe(depth=3).is_on()
        (False, True)
        """
        if "enabled" in type(self).model_fields:
            return bool(getattr(self, "enabled"))  # noqa: B009 - not every section has it
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            is_default = value == info.get_default(call_default_factory=True)
            if not is_default and (not isinstance(value, Section) or value.is_on()):
                return True
        return bool(self.__pydantic_extra__)

    @classmethod
    def is_switched_on(cls, data: Any) -> bool:
        """Return whether ``data``, written where the section belongs and perhaps wrong in other keys, enables it.

        Its ``enabled`` is read by the rules of that field alone; False where it is wrong, or no section is there.

        >>> class Probe(Section):
        ...     enabled: bool = False
        ...     depth: Count = 2
        >>> [Probe.is_switched_on({"enabled": word, "depth": -1}) for word in (True, "false", 1, "auto", "x")]
        [True, False, True, False, False]
        """
        field = cls.model_fields.get("enabled")
        if field is None or not isinstance(data, Mapping):
            return False
        written = cls.prepare({key: value for key, value in data.items() if cls._field_of_key.get(key) == "enabled"})
        try:
            return bool(_checker(cls, "enabled").validate_python(written.get("enabled", field.default)))
        except ValidationError:
            return False

    def why_off(self) -> str:
        """Return why nothing in the section is at work, empty if it is.

        >>> class Probe(Section):
        ...     enabled: bool = False
        >>> Probe().why_off(), Probe(enabled=True).why_off()
        ('not enabled', '')
        """
        if "enabled" in type(self).model_fields and not getattr(self, "enabled") and not self.is_on():  # noqa: B009
            return "not enabled"
        if self.comes_with:
            return f"what reads it comes with a later release of {self.comes_with}"
        return ""

    def given(self) -> dict[str, Any]:
        """Return what the user wrote, under the names DeepSpeed has for the keys -> the checked value."""
        # In the order of the class: a set has none.
        written = (name for name in type(self).model_fields if name in self.model_fields_set)
        keys = {type(self).model_fields[name].serialization_alias or name: getattr(self, name) for name in written}
        return {**keys, **(self.__pydantic_extra__ or {})}

    def unread(self, key: str) -> tuple[NoEffect, ...]:
        """Return why ``key``, one of those a section takes beside its fields, is read by nobody; empty where it is."""
        return ()

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, data: Any) -> Any:
        return cls.prepare(data) if isinstance(data, Mapping) else data

    @classmethod
    def prepare(cls, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return what to validate for ``data``, which is left as it is; a section with legacy forms extends this."""
        prepared = {}
        for name, value in data.items():
            field = cls.fields_by_key().get(name)
            if is_auto(value, cls.model_fields.get(field or "")):
                continue
            prepared[name] = value.value if isinstance(value, Enum) else value
        return prepared

    if not TYPE_CHECKING:  # a visible __getattr__ would hide our own typos from mypy

        def __getattr__(self, name: str) -> Any:
            field = type(self)._field_of_key.get(name)
            # A field that is its own key is missing only while pydantic builds the instance.
            return getattr(self, field) if field and field != name else super().__getattr__(name)


@cache
def _checker(section: type[Section], field: str) -> TypeAdapter[Any]:
    """Return what checks a value of one field by itself."""
    info = section.model_fields[field]
    checked: Any = Annotated[info.annotation, info]
    return TypeAdapter(checked)


@cache
def _docstrings(section: type[Section]) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in itertools.pairwise(body.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def key(*keys: str, default: Any, **constraints: Any) -> Any:
    """Return a field whose keys in a file are ``keys`` (the first is the one we print) and the field's own name."""
    return Field(default, validation_alias=AliasChoices(*keys), serialization_alias=keys[0], **constraints)


@dataclass(frozen=True)
class NotBuilt:
    """Marks a key that has no effect yet: any value but ``accepted`` is refused.

    Whoever builds the feature deletes the marker::

        sparse_gradients: Annotated[bool, NotBuilt(False)] = False
    """

    accepted: tuple[Any, ...]
    why: str

    def __init__(self, *accepted: Any, why: str = "which is not built yet") -> None:
        object.__setattr__(self, "accepted", accepted)
        object.__setattr__(self, "why", why)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, value: Any) -> Any:
        """Return ``value`` if it is one that changes nothing."""
        if value not in self.accepted:
            allowed = " or ".join(show(accepted) for accepted in self.accepted)
            raise PydanticCustomError(
                "not_built", "{why}; only {allowed} is accepted", {"why": self.why, "allowed": allowed}
            )
        return value


@dataclass(frozen=True)
class NoEffect:
    """Marks a key that is accepted and changes nothing, always or in some configurations; ``engine.report()`` says why.

    ::

        zero_allow_untested_optimizer: Annotated[bool, NoEffect("every optimizer is allowed")] = False
    """

    why: str
    """The reason, as it follows ``no effect:``."""
    when: Callable[[Config], bool] | None = None
    """Whether that holds for a configuration; None: for all."""

    def holds(self, config: Config) -> bool:
        """Return whether the key has no effect in ``config``."""
        return self.when is None or self.when(config)


def show(value: Any, *, limit: int = 60) -> str:
    """Return ``value`` as a user would write it in JSON, cut to ``limit`` characters.

    >>> show({"enabled": True})
    '{"enabled": true}'
    """
    text = _json(value, depth=3)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _json(value: Any, depth: int) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return _json(value.value, depth)
    if isinstance(value, str):
        return json.dumps(value[:1000], ensure_ascii=False)
    if isinstance(value, Mapping):
        inner = (f"{_json(name, 0)}: {_json(item, depth - 1)}" for name, item in _first(value.items()))
        return "{" + ", ".join(inner) + "}" if depth > 0 else "{...}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_json(item, depth - 1) for item in _first(value)) + "]" if depth > 0 else "[...]"
    if isinstance(value, int) and value.bit_length() > 4000:  # Python refuses to write whole numbers of 4300 digits
        return f"{'-' if value < 0 else ''}2**{value.bit_length() - 1} or more"
    try:
        return repr(value)
    except Exception:  # a stranger's object; that it cannot be shown must not hide what is wrong with it
        return f"an object of type {type(value).__name__}"


def _first(items: Any) -> list[Any]:
    # Messages show the beginning only; a list of a million entries must not be printed first and cut afterwards.
    return [item for item, _ in zip(items, range(20), strict=False)]


def _whole(value: Any) -> int:
    number = _number(value)
    if number is None or (isinstance(number, float) and not number.is_integer()):  # False for inf and nan too
        raise PydanticCustomError("whole_number", "must be a whole number")
    return int(number)


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


def lowered(value: Any) -> Any:
    """Return text in lower case and anything else as it is, for words whose case does not matter."""
    return value.lower() if isinstance(value, str) else value


_DTYPES = {
    **dict.fromkeys(("fp16", "float16", "half"), "float16"),
    **dict.fromkeys(("bf16", "bfloat16", "bfloat"), "bfloat16"),
    **dict.fromkeys(("fp32", "float32", "float"), "float32"),
}


def _dtype_name(value: Any) -> Any:
    # A torch.dtype prints as its name, so torch need not be imported to take one.
    text = str(value) if type(value).__module__ == "torch" else value
    return _DTYPES.get(text.removeprefix("torch."), text) if isinstance(text, str) else text


DtypeName = Annotated[Literal["float16", "bfloat16", "float32"], BeforeValidator(_dtype_name)]
"""torch's own name of a dtype; ``"fp16"``, ``"half"``, ``"torch.float16"`` and ``torch.float16`` are understood."""
