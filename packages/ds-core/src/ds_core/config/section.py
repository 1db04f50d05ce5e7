"""What every configuration section is made of: :class:`Section`, and the markers of its keys."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import types
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

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

from ds_core.config.number_types import Count, Fraction, Int, Number, PositiveInt
from ds_core.config.showing import HIDDEN, Secret, is_secret, show

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pydantic import GetCoreSchemaHandler
    from pydantic.fields import FieldInfo

    from ds_core.config.config import Config

__all__ = [
    "AUTO",
    "Count",
    "DtypeName",
    "Fraction",
    "Int",
    "NeededWhenOn",
    "NoEffect",
    "NotBuilt",
    "Number",
    "PositiveInt",
    "Secret",
    "Section",
    "is_auto",
    "key",
    "lowered",
    "needing",
    "show",
]

AUTO = "auto"
"""The value that means "the default" wherever there is one."""


def is_auto(value: Any, field: FieldInfo | None) -> bool:
    """Return whether ``value`` stands for the default of ``field``: it is ``"auto"``, and there is a default.

    Not where ``"auto"`` is a word of the field's own.
    """
    if not isinstance(value, str) or value != AUTO or field is None or field.is_required():
        return False
    return AUTO not in _words(field.annotation)


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are frozen, ``"auto"`` means the default.

    Null means that a key is not given, as programs write it that have a place for every key; where null is a value of
    the key's own type it is that value. A key may be written by its field name or by an alias, but not by both at once.
    The docstring under a field is its description (:meth:`descriptions`).

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
    _needed_when_on: ClassVar[dict[str, str]] = {}

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
        cls._needed_when_on = {
            name: info.serialization_alias or name
            for name, info in cls.model_fields.items()
            if _is_marked(info, NeededWhenOn)
        }

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
        # Not prepare: what it adds may depend on the answer.
        written = cls._written({key: value for key, value in data.items() if cls._field_of_key.get(key) == "enabled"})
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
        prepared = cls._written(data)
        if cls._needed_when_on and cls.is_switched_on(data):
            written = {cls._field_of_key.get(key): key for key in prepared}
            prepared = needing(prepared, (written.get(field, key) for field, key in cls._needed_when_on.items()))
        return prepared

    @classmethod
    def _written(cls, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return ``data`` without the keys that count as left out, and members of enumerations as their values."""
        plain = {name: value.value if isinstance(value, Enum) else value for name, value in data.items()}
        return {name: value for name, value in plain.items() if not cls.is_left_out(name, value)}

    @classmethod
    def is_left_out(cls, key: Any, value: Any) -> bool:
        """Return whether ``key`` counts as not given: it is null, or ``"auto"``, and that is no value of its own."""
        field = cls._field_of_key.get(key)
        if field is None:
            return False
        return field not in _nullable(cls) if value is None else is_auto(value, cls.model_fields[field])

    @classmethod
    def shown(cls, key: object, value: Any) -> str:
        """Return the value of ``key``, one of the section or not, as messages show it: without secrets."""
        field = cls.model_fields.get(cls._field_of_key.get(key, "")) if isinstance(key, str) else None
        is_hidden = is_secret(key) if field is None else _is_marked(field, Secret)
        return show(HIDDEN if is_hidden and value is not None else value)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            field = type(self).model_fields.get(name or "")
            yield name, HIDDEN if field is not None and value is not None and _is_marked(field, Secret) else value

    if not TYPE_CHECKING:  # a visible __getattr__ would hide our own typos from mypy

        def __getattr__(self, name: str) -> Any:
            field = type(self)._field_of_key.get(name)
            # A field that is its own key is missing only while pydantic builds the instance.
            return getattr(self, field) if field and field != name else super().__getattr__(name)


def _is_marked(field: FieldInfo, kind: type) -> bool:
    return any(isinstance(marker, kind) for marker in field.metadata)


def _words(annotation: Any) -> Iterable[Any]:
    """Yield the values that a type lists, such as those of a ``Literal``."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) in (Annotated, Union, types.UnionType):
        yield from itertools.chain.from_iterable(map(_words, get_args(annotation)))


@cache
def _nullable(section: type[Section]) -> frozenset[str]:
    """Return the fields whose type takes null."""
    return frozenset(name for name, info in section.model_fields.items() if _takes_null(info.annotation))


def _takes_null(annotation: Any) -> bool:
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return any(map(_takes_null, get_args(annotation)))
    return annotation in (Any, None, type(None))


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
    """Why anything else is refused, as it follows what was written."""
    fix: str
    """What to do instead."""

    def __init__(self, *accepted: Any, why: str = "which is not built yet", fix: str = "remove it") -> None:
        object.__setattr__(self, "accepted", accepted)
        object.__setattr__(self, "why", why)
        object.__setattr__(self, "fix", fix)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, value: Any) -> Any:
        """Return ``value`` if it is one that changes nothing."""
        if value not in self.accepted:
            allowed = " or ".join(show(accepted) for accepted in self.accepted)
            raise PydanticCustomError(
                "not_built",
                "{why}; only {allowed} is accepted",
                {"why": self.why, "allowed": allowed, "fix": self.fix},
            )
        return value


_MISSING = object()


@dataclass(frozen=True)
class NeededWhenOn:
    """Marks a key that must be given while its section is on (:meth:`Section.is_switched_on`)::

        max_tokens: Annotated[PositiveInt | None, NeededWhenOn()] = None

    Where the switch is in another section, that one says so (:func:`needing`).
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(_not_missing, handler(source))


def _not_missing(value: Any) -> Any:
    if value is _MISSING:
        raise PydanticCustomError("missing", "is missing, and the section is enabled")
    return value


def needing(data: Any, keys: Iterable[str]) -> Any:
    """Return ``data``, what a section is to be made of, so that each of ``keys`` that is left out or empty is an error.

    Args:
        data: left as it is; what is no mapping is returned.
        keys: they have the marker :class:`NeededWhenOn`.
    """
    if not isinstance(data, Mapping):
        return data
    return {**data, **{key: _MISSING for key in keys if _says_nothing(data.get(key))}}


def _says_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, (str, Mapping)) and value in ("", AUTO, {}))


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
