"""The configuration reference in docs/config/, written from the sections' classes.

``python tools/config_reference.py`` tells which pages are not what the classes say and exits with 1; ``--write`` writes
them. ``nox -s docs`` does the first, ``nox -s docs -- --write`` the second.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_core import registry
from ds_core._packages import PACKAGE_OF_PLUGIN
from ds_core.config.catalog import all_sections
from ds_core.config.config import BatchKeys, Config
from ds_core.config.effects import key_state, section_state
from ds_core.config.migrate import DEPRECATED
from ds_core.config.paths import sections_of
from ds_core.config.schema import default_of, names_of, plain
from ds_core.config.section import Section, show
from ds_core.config.sections.arguments import ARGUMENTS
from ds_core.config.sections.choices import ChoiceSection
from ds_core.config.value_schema import options
from ds_core.errors import ConfigError, NotBuiltError
from ds_core.optim.build import find_optimizer
from ds_core.schedules._build import build_schedule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo

ROOT = Path(__file__).parents[1]
FOLDER, PACKAGES = ROOT / "docs" / "config", ROOT / "packages"
COMMAND = "nox -s docs -- --write"
HEAD = f"<!-- Written by `{COMMAND}` from the classes in ds_core.config: change those, not this page. -->\n"

INDEX = """# Configuration

Every key of a configuration, from the classes that check it. `ds config explain FILE` shows the values that a file
gives, `ds config schema` is the same for editors.

- **Key**: as it is written; other names that mean the same are beneath it.
- **Default**: what holds without the key. `"auto"` means the default too; for batch sizes, and arguments of optimizers
  and schedules, it must have been replaced by a value when training begins.
- Null means that the key is not given, so its default holds; where null is listed under Type, it is a value of its own.
- Numbers may be in quotes (`"8"`) and whole ones may be written as `5e8`, switches also as `"true"` or `1`.
- Neither holds in `optimizer.params` and `scheduler.params`, which go to a constructor as they are.
- **State**: *effective*; *needs* a package, without which it is refused; *not built*, refused as soon as it asks for
  something; *no effect*, accepted and listed by `engine.report()`.
- **Source**: the part of the project's specification that the facts are from.

| Section | What it is | State |
|---|---|---|
"""


def pages() -> dict[str, str]:
    """Return the name of each page -> its text."""
    found = {"README.md": _index(), "top-level.md": _top_level()}
    for name, model in all_sections().items():
        text = f"# `{name}`\n\n{_head(model, name)}\n{_keys(model, name)}"
        text += _nested(model, name, section_state(model, name))
        found[f"{name}.md"] = HEAD + text + _options(name, model) + _arguments(name) + _old_keys((name,))
    return {name: text.rstrip("\n") + "\n" for name, text in found.items()}


def _index() -> str:
    rows = ["| [top level](top-level.md) | Keys outside of any section. | effective |\n"]
    for name, model in all_sections().items():
        meaning = plain((inspect.getdoc(model) or "").partition("\n\n")[0])
        rows.append(f"| [`{name}`]({name}.md) | {_cell(meaning)} | {_cell(section_state(model, name))} |\n")
    return HEAD + INDEX + "".join(rows)


def _top_level() -> str:
    text = f"# Top level\n\nKeys outside of any section. Source: {Config.source}.\n\n{TABLE}"
    for field in Config.model_fields:
        if field in BatchKeys.model_fields:  # optional in a file, resolved in Config
            text += _row(BatchKeys, field, "effective")
        elif field not in sections_of(Config):
            text += _row(Config, field, "effective")
    text += "| `$schema` | text | | Address of a JSON Schema, for editors. | no effect |\n"
    return HEAD + text + _old_keys(())


def _head(model: type[Section], name: str) -> str:
    text = "\n\n".join(map(plain, (inspect.getdoc(model) or "").split("\n\n")))
    state = section_state(model, name)
    return f"{text}\n\nState: {state}." + (f" Source: {model.source}." if model.source else "") + "\n"


TABLE = "| Key | Type | Default | Meaning | State |\n|---|---|---|---|---|\n"


def _keys(model: type[Section], name: str) -> str:
    rows = [_row(model, field, section_state(model, name)) for field in model.model_fields]
    further = ""
    if model.model_config.get("extra") == "allow":
        further = "\nFurther keys are accepted; see above for what becomes of them.\n"
    return (TABLE + "".join(rows) if rows else "It has no keys of its own.\n") + further


def _row(model: type[Section], field: str, state: str) -> str:
    info = model.model_fields[field]
    first, *others = (f"`{name}`" for name in names_of(model, field))
    names = first + (f"<br>also {', '.join(others)}" if others else "")
    default = default_of(info)
    cells = (
        names,
        _type(info),
        "required" if info.is_required() else f"`{default}`" if default else "",
        plain(_descriptions(model)[field]),
        key_state(info, state),
    )
    return "| " + " | ".join(map(_cell, cells)) + " |\n"


@cache
def _descriptions(model: type[Section]) -> Mapping[str, str]:
    return model.descriptions()  # reads the source, which takes its time


def _type(info: FieldInfo) -> str:
    found = options(info.annotation, info.metadata, lambda model: model.__name__, lambda value: False)
    words = [_words(schema) for schema in found]
    return " or ".join(dict.fromkeys(word for word in words if word)) or "anything"


def _words(schema: dict[str, Any], *, several: bool = False) -> str:
    """Return the form of a value in words.

    >>> _words({"type": "array", "items": {"type": "integer", "minimum": 1}})
    'list of whole numbers from 1'
    """
    if "enum" in schema:
        return ", ".join(f"`{show(word)}`" for word in schema["enum"])
    if "$ref" in schema:
        return "sections" if several else "section"
    kind = schema.get("type", "")
    ending = "s" if several else ""
    if isinstance(kind, list):
        return " or ".join(_words({**schema, "type": one}, several=several) for one in kind)
    if kind == "array" and "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])} {_words(schema['prefixItems'][0], several=True)}"
    if kind == "array":
        return f"list{ending} of {_words(schema['items'], several=True)}"
    if kind == "object":
        inner = _words(schema.get("additionalProperties") or {}, several=True)
        return f"object{ending}" + (f" of {inner}" if inner else "")
    plural = {"string": "text", "boolean": "true or false", "null": "null"}
    singular = {"integer": "whole number", "number": "number"}
    word = plural.get(kind) or (singular[kind] + ending if kind in singular else "")
    return word + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    parts = [
        "" if low is None else f" from {_number(low)}",
        "" if above is None else f" above {_number(above)}",
        "" if high is None else f" to {_number(high)}",
        "" if below is None else f" below {_number(below)}",
        ", not empty" if schema.get("minLength") else "",
    ]
    return "".join(parts)


def _number(bound: float) -> str:
    return str(int(bound)) if float(bound).is_integer() else str(bound)


def _nested(model: type[Section], path: str, state: str) -> str:
    """Return the keys of the sections inside ``model``, each under a heading of its own."""
    text = ""
    for field, inner in sections_of(model).items():
        if inner in all_sections().values():
            (name,) = (name for name, section in all_sections().items() if section is inner)
            text += f"\n## `{path}.{names_of(model, field)[0]}`\n\nThe same keys as [`{name}`]({name}.md).\n"
            continue
        info = model.model_fields[field]
        several = isinstance(info.get_default(call_default_factory=True), (dict, list, tuple))
        heading = f"{path}.{names_of(model, field)[0]}{'.*' if several else ''}"
        rows = "".join(_row(inner, name, state) for name in inner.model_fields)
        meaning = "\n\n".join(map(plain, (inspect.getdoc(inner) or "").split("\n\n")))
        text += f"\n## `{heading}`\n\n{meaning}\n\n{TABLE}{rows}" + _nested(inner, heading, state)
    return text


def _options(name: str, model: type[Section]) -> str:
    """Return the sub-sections of section ``name`` for the plugins of this repository that take options."""
    text = ""
    plugins = registry.installed(model.seam) if issubclass(model, ChoiceSection) else ()
    found = {plugin: plugin.load().Config for plugin in plugins if (PACKAGES / plugin.package).is_dir()}
    shown: dict[type[Section], str] = {}
    # A class before those that are made of it, which may have nothing to add.
    for plugin, taken in sorted(found.items(), key=lambda row: (row[0].package, len(getattr(row[1], "__mro__", ())))):
        if taken is None:
            continue
        shown[taken] = f"{name}.{plugin.name}"
        meaning = "\n\n".join(map(plain, (inspect.getdoc(taken) or "").split("\n\n")))
        state = "effective" if plugin.package == registry.CORE else f"needs {plugin.package}"
        text += f"\n## `{shown[taken]}`\n\n{meaning}\n\nState: {state}, where `{plugin.name}` is in force.\n\n"
        base = next((known for known in taken.__mro__[1:] if known in shown), None)
        if base is not None and base.model_fields.keys() == taken.model_fields.keys():
            text += f"The same keys as `{shown[base]}`.\n"
        else:
            text += TABLE + "".join(_row(taken, field, state) for field in taken.model_fields)
    return text


def _arguments(name: str) -> str:
    """Return the ``params`` of every type of section ``name`` that is known, types with the same ones together."""
    text = ""
    types = ARGUMENTS.get(name, {})
    for model in dict.fromkeys(types.values()):
        words = [word for word, arguments in types.items() if arguments is model]
        state = _type_state(name, words[0])
        listed = ", ".join(f"`{word}`" for word in words)
        rows = "".join(_row(model, field, state) for field in model.model_fields)
        source = f" Source: {model.source}." if model.source else ""
        meaning = f"{plain(inspect.getdoc(model) or '')}\n\nState: {state}.{source}"
        text += f"\n## `{name}.params` of {listed}\n\n{meaning}\n\n{TABLE}{rows}"
    return text


def _type_state(name: str, word: str) -> str:
    """Return the state of an optimizer or schedule: who builds it is asked, and says so."""
    import torch

    package = PACKAGE_OF_PLUGIN.get((name, word.lower()))
    if package:
        return f"needs {package}"
    try:
        if name == "optimizer":
            find_optimizer(word)
        else:
            build_schedule(word, {}, torch.optim.SGD([torch.zeros(1)], lr=0.1))
    except NotBuiltError:
        return "not built, refused"
    except ConfigError:  # it is there, and needs arguments
        pass
    return "effective"


def _old_keys(section: tuple[str, ...]) -> str:
    rows = [f"| `{row.old}` | {_cell(row.instead)} |\n" for row in DEPRECATED if row.section == section]
    if section == ("zero_optimization",):
        rows.insert(0, '| `"zero_optimization": true` | `"zero_optimization": {"stage": 1}` |\n')
    if not rows:
        return ""
    text = "Read as today's, with a warning; `ds config migrate FILE` rewrites them."
    return f"\n## Deprecated keys\n\n{text}\n\n| Key | Instead |\n|---|---|\n{''.join(rows)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def stale(folder: Path = FOLDER) -> list[str]:
    """Return the names of the pages in ``folder`` that are missing, changed, or not written any more."""
    return _differing(folder, pages())


def _differing(folder: Path, fresh: Mapping[str, str]) -> list[str]:
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    return sorted(name for name in fresh.keys() | there.keys() if fresh.get(name) != there.get(name))


def write(folder: Path = FOLDER) -> list[str]:
    """Write all pages and delete those that are not written any more; return the names of those that changed."""
    fresh = pages()
    changed = _differing(folder, fresh)
    folder.mkdir(parents=True, exist_ok=True)
    for name in changed:
        if name in fresh:
            (folder / name).write_text(fresh[name], encoding="utf-8")
        else:
            (folder / name).unlink()
    return changed


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the pages that differ")
    if parser.parse_args(arguments).write:
        for name in write(folder):
            print(f"written: docs/config/{name}")
        return 0
    changed = stale(folder)
    for name in changed:
        print(f"docs/config/{name} is not what the classes say")
    if changed:
        print(f"run: {COMMAND}")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
