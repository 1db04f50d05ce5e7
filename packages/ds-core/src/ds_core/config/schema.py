"""JSON Schema (draft 2020-12) of the configuration, which editors use for completion, descriptions and mistakes.

It is about form: keys, types, words and bounds, with everything that the loader takes (text for a number, ``"auto"``,
other names of a key), so that no configuration that loads is marked. What needs more than one key, or is refused
because it is not built, is left to ``ds config check``; descriptions say it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ds_core.config import catalog
from ds_core.config.config import BatchKeys, Config
from ds_core.config.migrate import DEPRECATED
from ds_core.config.paths import sections_of
from ds_core.config.section import AUTO, NoEffect, NotBuilt, Section, show
from ds_core.config.sections.argument_types import Arguments
from ds_core.config.sections.arguments import ARGUMENTS
from ds_core.config.sections.moved import Moved
from ds_core.config.value_schema import Accepts, Schema, any_case, merged, options, widened
from ds_core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic.fields import FieldInfo

    from ds_core.config.migrate import Deprecated

__all__ = ["default_of", "json_schema", "key_remarks", "names_of", "plain", "section_remarks"]

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(section: str | None = None) -> Schema:
    """Return the JSON Schema of the whole configuration, or of one top-level key; installed plugins' sections too.

    Args:
        section: a top-level key, such as ``zero_optimization``.

    Raises:
        ConfigError: there is no such key.

    >>> json_schema("fp16")["$defs"]["Fp16Section"]["properties"]["hysteresis"]["minimum"]
    1
    """
    writer = _Writer()
    whole = writer.configuration()
    if section is None:
        head = {"title": "Configuration of ds", "description": "Every key that ds and DeepSpeed know.", **whole}
    elif section in whole["properties"]:
        head = {"title": section, **whole["properties"][section]}
    else:
        close = nearest(section, whole["properties"])
        raise ConfigError(
            f"no top-level key is called {section!r}",
            fix=f"did you mean {close!r}?" if close else "leave it out for the schema of the whole configuration",
        )
    return {"$schema": DIALECT, **head, "$defs": writer.used_by(head)}


def names_of(model: type[Section], field: str) -> list[str]:
    """Return the keys that set ``field``, that which is printed first.

    >>> from ds_core.config import ZeroSection
    >>> names_of(ZeroSection, "reduce_bucket_numel")
    ['reduce_bucket_size', 'reduce_bucket_numel']
    """
    return [key for key, sets in model.fields_by_key().items() if sets == field]


def plain(text: str) -> str:
    """Return a docstring as one line of Markdown."""
    return " ".join(text.replace("``", "`").split())


def key_remarks(info: FieldInfo) -> list[str]:
    """Return what else must be known of a key: that it is deprecated, not built, or without effect."""
    found = []
    for marker in info.metadata:
        if isinstance(marker, Moved):
            found.append(f'Deprecated: write `"{marker.section}": {{"{marker.key}": ...}}`.')
        elif isinstance(marker, NotBuilt):
            allowed = " or ".join(f"`{show(value)}`" for value in marker.accepted)
            found.append(f"Only {allowed} is accepted: anything else asks for a thing {marker.why}.")
        elif isinstance(marker, NoEffect):
            found.append(f"{'Has no effect' if marker.when is None else 'May have no effect'}: {marker.why}.")
    return found


def section_remarks(model: type[Section]) -> list[str]:
    """Return what else must be known of a section: that it is not built, or without effect."""
    found = []
    if model.comes_with:
        found.append(f"Not built yet, refused while it is on: comes with a later release of {model.comes_with}.")
    if model.no_effect:
        found.append(f"Has no effect: {model.no_effect}.")
    return found


def default_of(info: FieldInfo) -> str:
    """Return the default as a user would write it; empty for a section, and where a key has none.

    >>> from ds_core.config import ZeroSection
    >>> default_of(ZeroSection.model_fields["reduce_scatter"])
    'true'
    """
    value = info.get_default(call_default_factory=True, validated_data={})
    return "" if info.is_required() or isinstance(value, Section) else show(value, limit=1000)


def _sentences(*parts: str) -> str:
    return " ".join(part for part in parts if part)


class _Writer:
    """Writes the schema of one section after the other, each once."""

    def __init__(self) -> None:
        self._definitions: dict[str, Schema] = {}
        self._names: dict[type[Section], str] = {}
        self._descriptions: dict[type[Section], Mapping[str, str]] = {}

    def configuration(self) -> Schema:
        """Return the schema of the whole configuration, without its definitions."""
        whole = self._object(Config)
        properties = whole["properties"]
        for name in BatchKeys.model_fields:
            # In Config they are resolved; in a file each may be left out, or "auto".
            properties[name] = self._property(BatchKeys, name)
        # The legacy form, which migrate() rewrites before anything is checked.
        properties["zero_optimization"]["type"].append("boolean")
        for name in catalog.RARE:
            properties[name] = self._top_level(catalog.rare_section(name))
        for name in _plugins():
            properties[name] = self._top_level(catalog.plugin_section(name))
        self._add_deprecated(properties, ())
        properties["$schema"] = {"type": "string", "description": "Address of this schema, for editors."}
        del whole["required"]  # of Config, where the batch sizes are resolved
        return {"type": "object", **whole}

    def used_by(self, schema: Schema) -> dict[str, Schema]:
        """Return the definitions that ``schema`` refers to, directly or not, by name."""
        found: dict[str, Schema] = {}
        waiting = list(_references(schema))
        while waiting:
            name = waiting.pop()
            if name not in found:
                found[name] = self._definitions[name]
                waiting += _references(found[name])
        return dict(sorted(found.items()))

    def _ref(self, model: type[Section]) -> str:
        if model not in self._names:
            name = model.__name__
            if name in self._definitions:  # two modules have one of that name
                name = f"{model.__module__.rpartition('.')[2]}.{name}"
            self._names[model] = name
            self._definitions[name] = {}  # taken, before a section inside asks for it
            self._definitions[name] = self._object(model)
        return f"#/$defs/{self._names[model]}"

    def _object(self, model: type[Section]) -> Schema:
        """Return the schema of ``model`` where an object stands; what else may stand there is said where it is used."""
        properties: Schema = {}
        required = []
        for field, info in model.model_fields.items():
            names = names_of(model, field)
            properties[names[0]] = self._property(model, field)
            if info.is_required() and len(names) == 1:
                required.append(field)
        for field in model.model_fields:
            first, *others = names_of(model, field)
            for name in others:
                same = properties[first]
                # doNotSuggest is what VS Code reads: the name is valid, and not offered.
                properties[name] = {**same, "description": f"The same as `{first}`.", "doNotSuggest": True}
        found: Schema = {"properties": properties, "additionalProperties": _further_keys(model)}
        if required:
            found["required"] = required
        for name in (name for name in ARGUMENTS if model is _declared(name)):
            self._add_types(name, found)
        for section, declared in catalog.all_sections().items():
            if declared is model:
                self._add_deprecated(properties, (section,))
        return found

    def _property(self, model: type[Section], field: str) -> Schema:
        info = model.model_fields[field]
        remarks = key_remarks(info)
        moved = next((marker for marker in info.metadata if isinstance(marker, Moved)), None)
        if moved is not None:  # it is checked where it is read
            target = self._property(sections_of(model)[moved.section], moved.key)
            return _out_of_use(target, _sentences(self._meanings(model).get(field, ""), *remarks), remarks[0])
        accepts = _accepts(model, names_of(model, field)[0])
        schema = merged(widened(options(info.annotation, info.metadata, self._ref, accepts), accepts))
        default = default_of(info)
        schema["description"] = _sentences(
            self._meanings(model).get(field, ""), f"Default: `{default}`." if default else "", *remarks
        )
        if isinstance(info.default, (bool, int, float, str)):
            schema["default"] = info.default
        return schema

    def _meanings(self, model: type[Section]) -> Mapping[str, str]:
        if model not in self._descriptions:  # read from the source, which takes its time
            self._descriptions[model] = {name: plain(text) for name, text in model.descriptions().items()}
        return self._descriptions[model]

    def _top_level(self, model: type[Section]) -> Schema:
        def accepts(value: Any) -> bool:
            if value is None or value == AUTO:
                return True
            try:
                model.model_validate(value)
            except ValidationError:
                return False
            return True

        schema = merged(widened(options(model, (), self._ref, accepts), accepts))
        return {**schema, "description": _sentences(plain(inspect.getdoc(model) or ""), *section_remarks(model))}

    def _add_types(self, name: str, schema: Schema) -> None:
        """Let ``params`` depend on ``type``, where its arguments are known."""
        schema["properties"]["type"]["examples"] = list(ARGUMENTS[name])
        schema["allOf"] = [
            {
                "if": {"properties": {"type": {"pattern": f"^{any_case(word)}$"}}, "required": ["type"]},
                "then": {"properties": {"params": {"$ref": self._ref(arguments)}}},
            }
            for word, arguments in ARGUMENTS[name].items()
        ]

    def _add_deprecated(self, properties: Schema, section: tuple[str, ...]) -> None:
        for row in DEPRECATED:
            if row.section == section:
                properties[row.old] = _deprecated(row, properties)


def _deprecated(row: Deprecated, properties: Schema) -> Schema:
    instead = f"Deprecated: write {row.instead}."
    accepted: Schema = {"enum": [True, False, AUTO]} if row.is_switch else properties[row.new] if row.new else {}
    return _out_of_use(accepted, instead, instead)


def _out_of_use(schema: Schema, description: str, message: str) -> Schema:
    """Return ``schema`` for a deprecated key: valid, marked by editors, and not offered."""
    marks = {"description": description, "deprecated": True, "deprecationMessage": message, "doNotSuggest": True}
    return {**{name: value for name, value in schema.items() if name != "default"}, **marks}


def _accepts(model: type[Section], key: str) -> Accepts:
    """Return whether the loader takes a value of ``key``, as far as its form goes: built or not does not count."""

    def accepts(value: Any) -> bool:
        if issubclass(model, Arguments) and isinstance(value, str) and value == AUTO:
            return True  # left to whoever needs the value, required or not
        try:
            model.model_validate({key: value})
        except ValidationError as error:
            return not any(
                details["loc"][:1] in ((), (key,)) and details["type"] != "not_built"
                for details in error.errors(include_url=False, include_context=False, include_input=False)
            )
        return True

    return accepts


def _further_keys(model: type[Section]) -> bool | Schema:
    """Return the schema of keys that ``model`` does not declare; False where it takes none."""
    if model.model_config.get("extra") != "allow":
        return False
    return True if _accepts(model, "any further key")(1) else {"type": "object"}


def _declared(name: str) -> type[Section]:
    return catalog.all_sections()[name]


def _plugins() -> list[str]:
    from ds_core import registry

    return sorted(registry.names("config"))


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].rpartition("/")[2]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)
