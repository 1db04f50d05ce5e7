"""The schema has every key of DeepSpeed's specification, as it is written down in ``keys.txt``, and no others."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args, get_origin

import pytest
from pydantic import TypeAdapter

from ds_core.config import Section
from ds_core.config.catalog import all_sections
from ds_core.config.config import Config
from ds_core.config.loading import examine
from ds_core.config.sections.arguments import ARGUMENTS, arguments_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Key(NamedTuple):
    """One line of ``keys.txt``."""

    path: str
    default: str
    others: tuple[str, ...]
    """Aliases; of a deprecated key, its replacement."""

    @property
    def top(self) -> str:
        return self.path.partition(".")[0]

    @property
    def beside(self) -> str:
        """The path of the section that holds the key, with its dot."""
        return self.path[: self.path.rfind(".") + 1]


def _lines() -> Iterator[Key]:
    for line in Path(__file__).with_name("keys.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            path, default, others, _ = (part.strip() for part in line.split("|"))
            yield Key(path, default, () if others == "-" else tuple(others.split()))


KEYS = tuple(_lines())
LISTED = tuple(key for key in KEYS if key.default != "deprecated")
DEPRECATED = tuple(key for key in KEYS if key.default == "deprecated")
TOPS = tuple(dict.fromkeys(key.top for key in KEYS))

OURS = {
    "partition.type",
    "precision.type",
    "checkpoint.engine",
    "bf16.auto_cast",
    *(f"activation_checkpointing.{name}" for name in ("policy", "modules", "interval", "memory_budget")),
    # torch's classes carry these out, and these arguments are theirs.
    "optimizer.params(adagrad).initial_accumulator_value",
    "optimizer.params(adagrad).lr_decay",
    "optimizer.params(adagrad).foreach",
    "optimizer.params(adagrad).maximize",
    "optimizer.params(adagrad).differentiable",
    "optimizer.params(adagrad).fused",
    "optimizer.params(adam).fused",
    "optimizer.params(adamw).fused",
}
"""Keys that the specification does not have."""
SAME_AS = {
    "inference.quant.weight.post_init_quant.*": "weight_quantization.post_init_quant.*",
    "inference.quant.weight.quantized_initialization": "weight_quantization.quantized_initialization",
    "inference.zero": "zero_optimization",
}
"""Sections that are another one over again, whose keys are listed: those are held against the list."""
OF_MUP = {"muadam", "muadamw", "musgd"}
"""Optimizers of another package, of whose arguments the specification says nothing."""


def _classes(annotation: Any) -> Iterator[tuple[int, type[Section]]]:
    """Yield the sections in a field's type, each with the number of free levels (dict, list) above it."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield 0, annotation
        return
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        arguments = arguments[:1]
    for argument in arguments:
        for levels, section in _classes(argument):
            yield levels + (origin in (dict, list, tuple)), section


def _held(section: type[Section], key: str) -> Mapping[int, type[Section]]:
    """Return the sections that ``key`` of ``section`` may hold, by free levels; empty for a plain value."""
    return dict(_classes(section.model_fields[section.fields_by_key()[key]].annotation))


def _holder(path: str) -> type[Section] | None:
    """Return the class that holds the last key of ``path``; None where there is none."""
    *parts, _ = path.split(".")
    if path.startswith(("optimizer.params(", "scheduler.params(")):
        seam, params, _ = path.split(".")
        return arguments_of(seam, params[len("params(") : -1])
    if not parts:
        return Config
    section = all_sections().get(parts.pop(0))
    while parts and section is not None:
        key, levels = parts.pop(0), 0
        while parts[:1] == ["*"]:
            parts.pop(0)
            levels += 1
        section = _held(section, key).get(levels) if key in section.fields_by_key() else None
    return section


def _is_there(path: str) -> bool:
    name = path.rpartition(".")[2]
    if path in all_sections():
        return True
    section = _holder(path)
    return section is not None and name in section.fields_by_key()


def _nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


@cache
def _descriptions(section: type[Section]) -> Mapping[str, str]:
    return section.descriptions()


def of_each_section(test: Any) -> Any:
    return pytest.mark.parametrize("top", TOPS)(test)


@of_each_section
def test_key_is_there(top: str) -> None:
    assert [key.path for key in LISTED if key.top == top and not _is_there(key.path)] == []


@of_each_section
def test_aliases_are_read_as_the_key(top: str) -> None:
    refused = []
    for key in LISTED:
        for alias in key.others if key.top == top else ():
            section, name = _holder(key.path), key.path.rpartition(".")[2]
            fields = section.fields_by_key() if section else {}
            # A deprecated alias is rewritten before the section sees it.
            value = json.loads(key.default) if key.default != "object" else {}
            renamed = [row.new for row in examine(_nested(key.beside + alias, value)).renamed]
            if tuple(key.path.split(".")) not in renamed and (alias not in fields or fields[alias] != fields.get(name)):
                refused.append(key.beside + alias)
    assert refused == []


@of_each_section
def test_default_is_the_listed_one(top: str) -> None:
    found = {}
    for key in LISTED:
        if key.top == top and key.default != "?" and _is_there(key.path):
            difference = _difference(key)
            if difference:
                found[key.path] = difference
    assert found == {}


def _difference(key: Key) -> str | None:
    """Return how the default of the schema differs from the listed one."""
    name = key.path.rpartition(".")[2]
    if key.path in all_sections():
        return None if key.default == "object" else f"is a section, listed is {key.default}"
    section = _holder(key.path)
    assert section is not None
    field = section.model_fields[section.fields_by_key()[name]]
    if key.default == "object":
        return None if _held(section, name) else f"holds no section but {field.annotation}"
    if field.is_required():
        return None if key.default == "-" else f"is required, listed is {key.default}"
    default = field.get_default(call_default_factory=True)
    if key.default == "-":
        return None if default is None else f"is {default!r}, none is listed"
    listed = json.loads(key.default)
    if _same(default, listed) or (listed == "auto" and default is None):
        return None
    if listed is not None:
        # DeepSpeed's words and ours differ ("fp16" and "float16"), but writing its default must change nothing.
        read = TypeAdapter(Annotated[(field.annotation, *field.metadata, "")]).validate_python(listed)
        if _same(default, read):
            return None
    return f"is {default!r}, listed is {key.default}"


def _same(default: Any, listed: Any) -> bool:
    if isinstance(default, bool) or isinstance(listed, bool):
        return default is listed
    if isinstance(default, tuple):
        default = list(default)
    return bool(default == listed)


@of_each_section
def test_key_is_described(top: str) -> None:
    silent = []
    for key in LISTED:
        section = _holder(key.path)
        name = key.path.rpartition(".")[2]
        if key.top != top or section is None or name not in section.fields_by_key():
            continue
        if not _descriptions(section).get(section.fields_by_key()[name], "").strip():
            silent.append(key.path)
    assert silent == []


def test_section_is_described() -> None:
    assert [name for name, section in all_sections().items() if not (section.__doc__ or "").strip()] == []


OLD_AND_NEW: dict[str, tuple[Any, Any]] = {
    "zero_optimization.cpu_offload": (True, "cpu"),
    "zero_optimization.cpu_offload_param": (True, "cpu"),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (True, True),
    "inference.mp_size": (4, 4),
    "inference.mpu": ("mpu", "mpu"),
    "inference.ep_size": (4, 4),
    "inference.ep_group": ("group", "group"),
    "inference.expert_group": ("group", "group"),
    "inference.ep_mp_group": ("group", "group"),
    "inference.expert_mp_group": ("group", "group"),
    "inference.moe_experts": ([4], [4]),
    "inference.moe_type": ("residual", "residual"),
}
"""Deprecated key -> a value of it, and the value of its replacement that means the same."""


@pytest.mark.parametrize("key", [key for key in DEPRECATED if key.others], ids=lambda key: key.path)
def test_deprecated_key_is_read_as_its_replacement(key: Key) -> None:
    old, new = OLD_AND_NEW[key.path]
    by_old, by_new = examine(_nested(key.path, old)), examine(_nested(key.others[0], new))
    assert by_old.config.section(key.top) == by_new.config.section(key.top) != examine({}).config.section(key.top)


@pytest.mark.parametrize("key", DEPRECATED, ids=lambda key: key.path)
def test_deprecated_key_is_named(key: Key) -> None:
    old, _ = OLD_AND_NEW.get(key.path, (True, None))
    assert [row.old for row in examine(_nested(key.path, old)).renamed] == [tuple(key.path.split("."))]


def _schema(section: type[Section], path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every key below ``section``: its path, and all the paths that mean the same."""
    if path.removesuffix(".") in SAME_AS:
        assert section is _holder(SAME_AS[path.removesuffix(".")] + ".any")
        return
    spellings: dict[str, list[str]] = {}
    for name, field in section.fields_by_key().items():
        spellings.setdefault(field, []).append(name)
    for names in spellings.values():
        yield path + names[0], tuple(path + name for name in names)
        for levels, held in _held(section, names[0]).items():
            for name in names:
                # Listed under one of the names: that is the one to go on with.
                if name == names[0] or any(key.path.startswith(f"{path}{name}.") for key in LISTED):
                    yield from _schema(held, f"{path}{name}." + "*." * levels)


def _unlisted(found: Iterator[tuple[str, tuple[str, ...]]]) -> list[str]:
    listed = {key.path for key in KEYS} | OURS
    return [path for path, same in found if listed.isdisjoint(same)]


@pytest.mark.parametrize("top", sorted(all_sections()))
def test_no_key_of_a_section_is_unknown(top: str) -> None:
    assert top in {key.top for key in KEYS} | {path.partition(".")[0] for path in OURS} | SAME_AS.keys()
    assert _unlisted(_schema(all_sections()[top], f"{top}.")) == []


def test_no_key_at_the_top_is_unknown() -> None:
    plain = ((name, (name,)) for name in Config.model_fields if name not in all_sections())
    assert _unlisted(plain) == []


TYPES = sorted({key.path.rpartition(".")[0] for key in KEYS if ".params(" in key.path})


@pytest.mark.parametrize("params", TYPES)
def test_no_argument_is_unknown(params: str) -> None:
    section = _holder(f"{params}.any")
    assert section is not None
    assert _unlisted(_schema(section, f"{params}.")) == []


def test_arguments_of_every_type_are_listed() -> None:
    listed = {tuple(params.lower().removesuffix(")").split(".params(")) for params in TYPES}
    known = {(section, name.lower()) for section, models in ARGUMENTS.items() for name in models}
    assert known - {("optimizer", name) for name in OF_MUP} == listed
