"""JSON Schema of one value: what its type says, and what its validators are found to take beside it.

Validators are functions, which no schema can be read from. So they are asked: ``"1"`` where a number is due, null,
``"auto"``, another case of a word. What they take beyond one such sample is not seen, nor what they refuse.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ds_core.config.section import AUTO, Section

__all__ = ["Accepts", "Schema", "any_case", "merged", "options", "widened"]

Schema = dict[str, Any]
Accepts = Callable[[Any], bool]
"""Whether the loader takes a value as far as its form goes."""
Ref = Callable[[type[Section]], str]

PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null", dict: "object"}
NUMBERS = {"integer", "number"}
BOUNDS = {
    "integer": {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"},
    "string": {"min_length": "minLength", "max_length": "maxLength", "pattern": "pattern"},
    "array": {"min_length": "minItems", "max_length": "maxItems"},
    "object": {"min_length": "minProperties", "max_length": "maxProperties"},
}
BOUNDS["number"] = BOUNDS["integer"]
NUMBER_TEXT = r"\s*[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\s*"
"""A number in quotes. Bounds do not reach into it."""
INFINITY_TEXT = "inf|Infinity"
SWITCH_WORDS = ("true", "false", "yes", "no", "on", "off", "t", "f", "y", "n", "1", "0")
DTYPE_WORDS = ("fp16", "float16", "half", "bf16", "bfloat16", "bfloat", "fp32", "float32", "float")
SOME_TEXT = "any text"


def options(annotation: Any, metadata: Sequence[Any], ref: Ref, accepts: Accepts) -> list[Schema]:
    """Return a schema for each form that a value of type ``annotation`` has, as its author would write it.

    Args:
        annotation: a type of :mod:`ds_core.config.section`, or one made of those.
        metadata: what stands beside it in ``Annotated``.
        ref: the ``$ref`` of a section's class.
        accepts: whether the loader takes a value there; asked about what is inside a list or a free object.

    >>> options(Annotated[int, FieldInfo(ge=0)] | None, (), ref=str, accepts=lambda value: False)
    [{'type': 'integer', 'minimum': 0}, {'type': 'null'}]
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return options(arguments[0], (*arguments[1:], *metadata), ref, accepts)
    for marker in reversed(metadata):
        if isinstance(marker, BeforeValidator) and marker.json_schema_input_type is not PydanticUndefined:
            return options(marker.json_schema_input_type, (), ref, accepts)
    if origin in (Union, types.UnionType):
        found = [schema for argument in arguments for schema in options(argument, (), ref, accepts)]
    elif origin is Literal:
        found = [{"enum": list(arguments)}]
    elif annotation is Any:
        return [{}]
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        found = [{"type": "object", "$ref": ref(annotation)}]
    elif origin is dict:
        inside = _item(arguments[1], ref, lambda value: accepts({"name": value}))
        found = [{"type": "object", "additionalProperties": inside}]
    elif origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        found = [{"type": "array", "items": _item(arguments[0], ref, lambda value: accepts([value]))}]
    elif origin is tuple:
        size = {"minItems": len(arguments), "maxItems": len(arguments)}
        items = [_item(argument, ref, lambda value: accepts([value] * len(arguments))) for argument in arguments]
        found = [{"type": "array", "prefixItems": items, **size}]
    else:
        found = [{"type": PLAIN[annotation]}]
    return [{**schema, **_bounds(schema, metadata)} for schema in found]


def _item(annotation: Any, ref: Ref, accepts: Accepts) -> Schema:
    """Return the schema of a value inside a list or a free object."""
    return merged(widened(options(annotation, (), ref, accepts), accepts))


def _bounds(schema: Schema, metadata: Iterable[Any]) -> Schema:
    names = BOUNDS.get(schema.get("type", ""), {})
    return {
        names[name]: getattr(rule, name)
        for rule in _rules(metadata)
        for name in names
        if getattr(rule, name, None) is not None
    }


def _rules(metadata: Iterable[Any]) -> Iterator[Any]:
    for rule in metadata:
        yield from rule.metadata if isinstance(rule, FieldInfo) else (rule,)


def widened(found: list[Schema], accepts: Accepts) -> list[Schema]:
    """Return ``found`` and a schema for each further form that ``accepts`` turns out to take."""
    if {} in found:
        return [{}]
    result = [dict(schema) for place, schema in enumerate(found) if schema not in found[:place]]
    for schema in result:
        if "items" in schema and not accepts([]):
            schema.setdefault("minItems", 1)
    kinds = {schema["type"] for schema in found if "type" in schema}
    words = list(dict.fromkeys(word for schema in found for word in schema.get("enum", ())))
    texts = [] if "string" in kinds else list(_texts(kinds, words, accepts))
    if AUTO in texts and words:  # where words are offered, this is one of them
        texts.remove(AUTO)
        result = [{"enum": [*words, AUTO]}, *(schema for schema in result if "enum" not in schema)]
    if "string" not in kinds and accepts(SOME_TEXT):
        result.append({"type": "string"})
    elif texts:
        result.append({"type": "string", "pattern": f"^(?:{'|'.join(texts)})$"})
    if "boolean" in kinds and not kinds & NUMBERS and (accepts(1) or accepts(0)):
        result.append({"type": "integer", "minimum": 0, "maximum": 1})
    elif "boolean" not in kinds and accepts(True) and accepts(False):
        result.append({"type": "boolean"})
    if not kinds & {"boolean", *NUMBERS} and accepts(1) and accepts(3):
        result.append({"type": "number"})
    further: tuple[tuple[str, Any], ...] = (("null", None), ("array", []), ("object", {}))
    result += [{"type": kind} for kind, sample in further if kind not in kinds | _kinds(words) and accepts(sample)]
    return result


def _texts(kinds: set[str], words: Sequence[Any], accepts: Accepts) -> Iterator[str]:
    """Yield a pattern for each kind of text that stands for something else."""
    if AUTO not in words and accepts(AUTO):
        yield AUTO
    if kinds & NUMBERS and any(map(accepts, ("1", "0", "2", "0.5"))):
        yield NUMBER_TEXT
    if kinds & NUMBERS and accepts("inf"):
        yield INFINITY_TEXT
    if "boolean" in kinds and accepts("true"):
        yield from map(any_case, SWITCH_WORDS)
    names = [word for word in words if isinstance(word, str) and word != AUTO]
    for word in names:
        if all(map(accepts, (word.lower(), word.upper(), word.capitalize()))) and word.lower() != word.upper():
            yield any_case(word)
    if "float16" in names:
        further = (*DTYPE_WORDS, *(f"torch.{word}" for word in DTYPE_WORDS))
        yield from (re.escape(word) for word in further if word not in names and accepts(word))


def _kinds(words: Iterable[Any]) -> set[str]:
    return {PLAIN[type(word)] for word in words}


def any_case(word: str) -> str:
    """Return a pattern for ``word`` in any case, for the dialect of JSON Schema, which has no flag for it.

    >>> any_case("no")
    '[nN][oO]'
    """
    return "".join(f"[{letter.lower()}{letter.upper()}]" if letter.isalpha() else re.escape(letter) for letter in word)


def merged(found: list[Schema]) -> Schema:
    """Return one schema that takes what any of ``found`` takes.

    Keywords such as ``minimum`` and ``pattern`` act on values of their own type only, so forms of different types are
    one flat schema: editors tell more about that than about ``anyOf``.

    >>> merged([{"type": "integer", "minimum": 0}, {"type": "null"}])
    {'type': ['integer', 'null'], 'minimum': 0}
    """
    if {} in found:
        return {}
    words = [schema for schema in found if "enum" in schema]
    rest = [schema for schema in found if "enum" not in schema]
    if words:
        enum = list(dict.fromkeys(word for schema in words for word in schema["enum"]))
        if {"type": "null"} in rest:
            rest.remove({"type": "null"})
            enum.append(None)
        return {"anyOf": [{"enum": enum}, *rest]} if rest else {"enum": enum}
    kinds = [schema["type"] for schema in rest]
    if len(set(kinds)) < len(kinds) or set(kinds) >= NUMBERS:
        return {"anyOf": rest}
    flat = {name: value for schema in rest for name, value in schema.items() if name != "type"}
    return {"type": kinds if len(kinds) > 1 else kinds[0], **flat}
