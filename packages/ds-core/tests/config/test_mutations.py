"""Random mutations of good configurations load to the same meaning, or are refused by a problem that names the place.

Good ones are what clients write, every default written out, and random ones from the schema. Nothing but
``ConfigError`` may come out, and what was given is left as it is.
"""

from __future__ import annotations

import base64
import copy
import functools
import json
import math
import os
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from ds_core.config import ConfigError, Section, examine, load_config
from ds_core.config.catalog import all_sections
from ds_core.config.config import BatchKeys, Config
from ds_core.config.effects import without_effect
from ds_core.config.migrate import DEPRECATED
from ds_core.config.paths import dotted, sections_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ds_core.config.loading import Examined
    from ds_core.config.problems import Problem

HERE = Path(__file__).parent
Keys = tuple[Any, ...]
WORLD = 2
"""Data-parallel ranks for the batch sizes."""

# The deadline of hypothesis would measure the machine; its explanations take longer than all examples.
# The same examples each time: a commit must not fail for what it has not changed. ``DS_MUTATIONS=10`` hunts for more:
# ten times as many, and others at each run.
FACTOR = int(os.environ.get("DS_MUTATIONS", "1"))
few = settings(
    deadline=None,
    derandomize=FACTOR == 1,
    max_examples=40 * FACTOR,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    phases=[phase for phase in Phase if phase is not Phase.explain],
)
many = settings(few, max_examples=120 * FACTOR)


@pytest.fixture(autouse=True, scope="module")
def _strict_by_default() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DS_CONFIG_COMPATIBLE", "DEEPSPEED_ELASTICITY_CONFIG"):
            patch.delenv(name, raising=False)
        yield


# --- good configurations


DEFAULTS: dict[str, Any] = json.loads((HERE / "defaults.json").read_text(encoding="utf-8"))
"""Dotted path -> default; ``*`` stands for a name of the user's."""


def _written_out() -> dict[str, Any]:
    """Return a configuration that gives every key its default."""
    result: dict[str, Any] = {}
    absent = {path for path, default in DEFAULTS.items() if default is None}
    for path, default in DEFAULTS.items():
        parts = path.split(".")
        if "*" in parts or "(" in path or absent & {".".join(parts[:length]) for length in range(1, len(parts))}:
            continue
        _put(result, tuple(parts), copy.deepcopy(default))
    return {**result, "train_batch_size": 8}


def _put(config: dict[str, Any], keys: Keys, value: Any) -> None:
    for key in keys[:-1]:
        config = config.setdefault(key, {})
    config[keys[-1]] = value


BATCH = {"train_batch_size", "train_micro_batch_size_per_gpu"}


def _examined(config: Any) -> Examined:
    """Return ``config`` examined as for a run, unless its client has not filled in everything."""
    return examine(config, dp_world_size=None if "auto" in repr(config) else WORLD)


def _good_clients() -> list[dict[str, Any]]:
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((HERE / "clients").glob("*.json"))]
    # One of them is a template without batch sizes.
    contents = [content if BATCH & content.keys() else {**content, "train_batch_size": 8} for content in contents]
    # Another is for one rank.
    return [content for content in contents if not _examined(content).problems]


@functools.cache
def _bases() -> list[dict[str, Any]]:
    return [*_good_clients(), _written_out()]


PLAIN_PATHS = sorted(path for path in DEFAULTS if "*" not in path and "(" not in path)
VALUES: list[Any] = [
    *(True, False, None, 0, 1, 2, 3, 16, 0.5, 1.0, "auto", "5e8", [], [1], {}),
    *("cpu", "nvme", "none", "bf16", "fp32", "topk", "fixed_linear", "random", "/tmp/x", "step", "warning", "mean"),
]


@functools.cache
def _fitting(path: str) -> list[Any]:
    """Return the values among ``VALUES`` that ``path`` may have."""
    found = []
    for value in VALUES:
        config: dict[str, Any] = {}
        _put(config, tuple(path.split(".")), value)
        if not examine(config).problems:
            found.append(value)
    return found


@st.composite
def random_configs(draw: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": draw(st.integers(1, 9))}
    for path in draw(st.lists(st.sampled_from(PLAIN_PATHS), unique=True, max_size=12)):
        keys = tuple(path.split("."))
        fitting = _fitting(path)
        holder = _at(config, keys[:-1], {})
        if keys[0] in BatchKeys.model_fields or not fitting or not isinstance(holder, dict) or keys[-1] in holder:
            continue
        before = copy.deepcopy(config)
        try:
            _put(config, keys, copy.deepcopy(draw(st.sampled_from(fitting))))
        except (AttributeError, TypeError):  # a value already stands where a section would have to
            config = before
    assume(not examine(config, dp_world_size=2).problems)
    return config


def good_configs() -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(st.deferred(lambda: st.sampled_from(_bases())), random_configs()).map(copy.deepcopy)


# --- places


def _paths(value: Any, path: Keys = ()) -> Iterator[Keys]:
    """Yield the place of every key and of every entry of a list."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _paths(item, (*path, key))


def _at(value: Any, keys: Keys, default: Any = None) -> Any:
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return default
    return value


def _keys_of(config: Any, *, is_dict: bool | None = None) -> list[Keys]:
    """Return the places of keys (not of entries of lists), all or those of objects or of other values."""
    found = [path for path in _paths(config) if isinstance(path[-1], str)]
    return [path for path in found if is_dict is None or isinstance(_at(config, path), dict) == is_dict]


def _known_words() -> set[str]:
    words = {row.old for row in DEPRECATED} | {part for path in DEFAULTS for part in path.split(".")} | {"$schema"}
    pending = [Config, BatchKeys, *all_sections().values()]
    while pending:
        section = pending.pop()
        words |= set(section.fields_by_key())
        pending += sections_of(section).values()
    return words


KNOWN = _known_words()


def _value_of(examined: Examined, keys: Keys) -> Any:
    """Return what ``keys`` is in the checked configuration, as JSON has it; ``KeyError`` where it has no field."""
    value: Any = examined.config
    for key in keys:
        if isinstance(value, Config) and key not in Config.fields_by_key():
            value = value.section(key)
        elif isinstance(value, Section) and key in type(value).fields_by_key():
            value = getattr(value, type(value).fields_by_key()[key])
        elif isinstance(value, dict):
            value = value[key]
        else:
            raise KeyError(key)
    if isinstance(value, Section):
        value = value.model_dump(by_alias=True)
    return json.loads(json.dumps(value))


def _means_the_same(examined: Examined, other: Examined) -> bool:
    mine, theirs = examined.config.sections, other.config.sections
    names = mine.keys() | theirs.keys()
    plain = [dict(each.config) for each in (examined, other)]
    return plain[0] == plain[1] and all(examined.config.section(name) == other.config.section(name) for name in names)


# --- the property


def _names(problem: Problem, keys: Keys) -> bool:
    """Return whether ``problem`` is at ``keys``, at what holds it, or inside it, or speaks of it in its words."""
    length = min(len(problem.keys), len(keys))
    is_near = length > 0 and problem.keys[:length] == keys[:length]
    said = f"{problem.path} {problem.text} {problem.fix}"
    return is_near or dotted(keys) in said or f'"{keys[-1]}"' in said


def _is_in_vain(examined: Examined, keys: Keys) -> bool:
    """Return whether the report lists ``keys``, or a section that holds it, as having no effect."""
    listed = without_effect(examined.config)
    return any(".".join(map(str, keys[:length])) in listed for length in range(1, len(keys) + 1))


def check(config: Any, *places: Keys, is_right: Callable[[Examined], bool]) -> None:
    """Check that ``config`` is refused at one of ``places``, or loads and ``is_right``."""
    before = repr(config)
    examined = _examined(config)
    assert repr(config) == before
    if examined.problems:
        assert any(_names(problem, place) for problem in examined.problems for place in places), examined.problems
        with pytest.raises(ConfigError):
            load_config(config, dp_world_size=WORLD)
        assert repr(config) == before
    else:
        assert is_right(examined), f"{places} was accepted in silence: {config}"


def drawn(data: Any, config: Any, *, is_dict: bool | None = None) -> Keys:
    """Return the place of one key of ``config``."""
    places = [place for place in _keys_of(config, is_dict=is_dict) if not _is_free(place)]
    assume(places)
    place: Keys = data.draw(st.sampled_from(places))
    return place


FREE = {("optimizer", "params"), ("scheduler", "params"), ("amp",), ("quantize_training",), ("datastates_ckpt",)}


def _is_free(place: Keys) -> bool:
    """Return whether the holder of ``place`` takes any key: arguments of torch's classes, options of other packages."""
    return place[:-1] in FREE


def _edited(data: Any, word: str) -> str:
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(word)))
        kind = data.draw(st.sampled_from(["insert", "delete", "replace", "swap"]))
        letter = data.draw(st.sampled_from(string.ascii_lowercase + "_1"))
        if kind == "insert":
            word = word[:at] + letter + word[at:]
        elif kind == "delete":
            word = word[:at] + word[at + 1 :]
        elif kind == "replace":
            word = word[:at] + letter + word[at + 1 :]
        else:
            word = word[:at] + word[at + 1 : at + 2] + word[at : at + 1] + word[at + 2 :]
    return word


def _renamed(config: dict[str, Any], place: Keys, new: str) -> None:
    holder = _at(config, place[:-1])
    items = [(new if key == place[-1] else key, value) for key, value in holder.items()]
    holder.clear()
    holder.update(items)


@many
@given(good_configs(), st.data())
def test_a_key_renamed_by_a_slip(config: dict[str, Any], data: Any) -> None:
    place = drawn(data, config)
    new = _edited(data, place[-1])
    assume(new not in KNOWN and new not in _at(config, place[:-1]))
    _renamed(config, place, new)
    renamed = (*place[:-1], new)
    check(config, renamed, is_right=lambda examined: _is_in_vain(examined, renamed))


@few
@given(good_configs(), st.data())
def test_a_key_in_another_case(config: dict[str, Any], data: Any) -> None:
    place = drawn(data, config)
    new = data.draw(st.sampled_from([str.upper, str.title, str.swapcase]))(place[-1])
    assume(new not in KNOWN)
    _renamed(config, place, new)
    renamed = (*place[:-1], new)
    check(config, renamed, is_right=lambda examined: _is_in_vain(examined, renamed))


@many
@given(good_configs(), st.data())
def test_a_key_moved_to_another_section(config: dict[str, Any], data: Any) -> None:
    place = drawn(data, config)
    holders = [(), *(holder for holder in _keys_of(config, is_dict=True) if holder[: len(place)] != place)]
    holder = data.draw(st.sampled_from(holders))
    moved = (*holder, place[-1])
    assume(not _is_free(moved) and place[-1] not in _at(config, holder))
    assume(not _has_field(moved))
    value = _at(config, place[:-1]).pop(place[-1])
    _at(config, holder)[place[-1]] = value
    check(config, moved, place, is_right=lambda examined: _is_in_vain(examined, moved))


def _has_field(place: Keys) -> bool:
    """Return whether ``place`` is one of the schema's keys."""
    section: type[Section] | None = Config
    for index, key in enumerate(place):
        if section is None:
            return False
        tops = {**sections_of(Config), **all_sections()}
        if index == 0 and key in tops:
            section = tops[key]
        elif key in section.fields_by_key() or (index == 0 and key in BatchKeys.model_fields):
            section = sections_of(section).get(section.fields_by_key().get(key, ""))
        else:
            return (place[:index], key) in {(row.section, row.old) for row in DEPRECATED}
    return True


@many
@given(good_configs(), st.data())
def test_a_key_that_is_left_out(config: dict[str, Any], data: Any) -> None:
    place = drawn(data, config)
    del _at(config, place[:-1])[place[-1]]

    def is_default(examined: Examined) -> bool:
        path = ".".join(map(str, place))
        if path not in DEFAULTS or DEFAULTS[path] is None or place[0] in BatchKeys.model_fields:
            return True
        try:
            return bool(_value_of(examined, place) == DEFAULTS[path])
        except KeyError:  # the section that holds it is left out altogether
            return _value_of(examined, place[:-1]) is None

    check(config, place, is_right=is_default)


WRONG_TYPES: list[Any] = ["zork", True, 7, 1.25, None, [], [1], {}, {"zork": 1}, [{"zork": [None]}], ""]


def _kind(value: Any) -> str:
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


@many
@given(good_configs(), st.data())
def test_a_value_of_another_type(config: dict[str, Any], data: Any) -> None:
    place = drawn(data, config)
    old = _at(config, place)
    wrong = data.draw(st.sampled_from([value for value in WRONG_TYPES if _kind(value) != _kind(old)]))
    _put_at(config, place, wrong)
    check(config, place, is_right=lambda examined: _is_taken_as_given(examined, place, wrong))


def _put_at(config: Any, place: Keys, value: Any) -> None:
    _at(config, place[:-1])[place[-1]] = copy.deepcopy(value)


def _is_told(examined: Examined, place: Keys) -> bool:
    """Return whether ``place`` was read as another key, with a warning, or is listed as having no effect."""
    return any(row.old == place for row in examined.renamed) or _is_in_vain(examined, place)


def _is_open(examined: Examined, place: Keys) -> bool:
    """Return whether ``place`` is a batch size, and those were not resolved."""
    return place[0] in BatchKeys.model_fields and examined.dp_world_size is None


def _is_taken_as_given(examined: Examined, place: Keys, value: Any) -> bool:
    """Return whether the value at ``place`` says what was written: the same, a default for what says nothing."""
    if value is None or value == {} or _is_told(examined, place) or _is_open(examined, place):
        return True
    held = _value_of(examined, place)
    if isinstance(held, (int, float)) and isinstance(value, (int, float)):
        return math.isclose(held, value)
    if isinstance(value, bool) and isinstance(held, dict):  # a switch in place of its section
        return held.get("enabled") is value
    return held == value or held == [value]  # one name in place of a list of names


@few
@given(good_configs(), st.data())
def test_a_value_in_a_list(config: dict[str, Any], data: Any) -> None:
    place = drawn(data, config)
    value = _at(config, place)
    _put_at(config, place, [value])
    check(config, place, is_right=lambda examined: _is_taken_as_given(examined, place, [value]))


NUMBERS = [-(10**9), -1, -0.5, 0, 0.5, 10**9, 10**30, 10**400, 1e300, math.nan, math.inf, -math.inf]


@many
@given(good_configs(), st.data())
def test_a_number_out_of_bounds(config: dict[str, Any], data: Any) -> None:
    places = [place for place in _keys_of(config) if _kind(_at(config, place)) == "number" and not _is_free(place)]
    assume(places)
    place = data.draw(st.sampled_from(places))
    number = data.draw(st.sampled_from(NUMBERS))
    _put_at(config, place, number)
    check(config, place, is_right=lambda examined: _is_number(examined, place, number))


def _is_number(examined: Examined, place: Keys, number: float) -> bool:
    if place == ("steps_per_print",) and number in (math.inf, -math.inf):
        return _value_of(examined, place) is None
    if _is_told(examined, place) or _is_open(examined, place):
        return True
    held = _value_of(examined, place)
    return bool(held == number or (isinstance(held, float) and held == float(number)))


@many
@given(good_configs(), st.data())
def test_a_key_that_nobody_knows(config: dict[str, Any], data: Any) -> None:
    holder = data.draw(st.sampled_from([(), *_keys_of(config, is_dict=True)]))
    word = data.draw(st.text(string.ascii_lowercase + "_.- é", min_size=1, max_size=12))
    place = (*holder, word)
    assume(word not in KNOWN and word not in _at(config, holder) and not _is_free(place))
    _at(config, holder)[word] = data.draw(st.sampled_from([1, "x", None, {}, [1], {"enabled": True}]))
    check(config, place, is_right=lambda examined: _is_in_vain(examined, place))


@many
@given(good_configs(), st.data())
def test_auto_anywhere(config: dict[str, Any], data: Any) -> None:
    place = drawn(data, config)
    without = copy.deepcopy(config)
    del _at(without, place[:-1])[place[-1]]
    _put_at(config, place, "auto")
    left_out = examine(without)
    check(config, place, is_right=lambda examined: bool(left_out.problems) or _means_the_same(examined, left_out))


def _written(value: Any, twice: Keys) -> str:
    """Return ``value`` as JSON with the key ``twice`` given two times."""
    if not isinstance(value, dict):
        return json.dumps(value)
    members = []
    for key, item in value.items():
        is_on_the_way = twice[:1] == (key,)
        member = f"{json.dumps(key)}: {_written(item, twice[1:] if is_on_the_way else ())}"
        members += [member, member] if is_on_the_way and len(twice) == 1 else [member]
    return "{" + ",\n".join(members) + "}"


def _encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


@few
@given(good_configs(), st.data())
def test_a_key_given_twice(config: dict[str, Any], data: Any) -> None:
    place = data.draw(st.sampled_from([place for place in _keys_of(config) if all(isinstance(k, str) for k in place)]))
    problems = examine(_encoded(_written(config, place))).problems
    assert [(problem.keys, problem.text) for problem in problems] == [(place, "is given twice in one object")]
    assert problems[0].place is not None


# --- what a configuration means does not depend on how it is given


def _shuffled(data: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shuffled(data, value[key]) for key in data.draw(st.permutations(list(value)))}
    return value


@few
@given(good_configs(), st.data())
def test_neither_the_order_of_keys_nor_the_form_matters(config: dict[str, Any], data: Any) -> None:
    plain = examine(config)
    assert _means_the_same(plain, examine(config))
    assert _means_the_same(plain, examine(_shuffled(data, config)))
    text = json.dumps(config)
    forms = [_encoded(text)]
    if "Infinity" not in text:  # which is a word to HJSON
        forms.append(_encoded("# HJSON\n" + json.dumps(config, indent=1)))
    for form in forms:
        other = examine(form)
        assert other.document.text is not None
        assert (other.problems, other.document.raw) == ((), plain.document.raw)
        assert _means_the_same(plain, other)


@few
@given(good_configs(), st.data())
def test_compatibility_mode_is_strict_mode_without_the_keys_it_warns_of(config: dict[str, Any], data: Any) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        holder = data.draw(st.sampled_from([(), *_keys_of(config, is_dict=True)]))
        word = data.draw(st.text(string.ascii_lowercase + "_", min_size=3, max_size=9))
        assume(word not in KNOWN and word not in _at(config, holder) and not _is_free((*holder, word)))
        _at(config, holder)[word] = data.draw(st.sampled_from([1, "x", None, [1]]))
    examined = examine(config, compatible=True)
    strict = copy.deepcopy(config)
    for warning in examined.warnings:
        del _at(strict, warning.keys[:-1])[warning.keys[-1]]
    other = examine(strict, compatible=False)
    assert [str(problem) for problem in examined.problems] == [str(problem) for problem in other.problems]
    assert _means_the_same(examined, other)
    assert examined.warnings or examined.problems or not examine(config, compatible=False).problems


# --- anything at all

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["auto", "cpu", "true", "1e5", "nvme", "AdamW", "WarmupLR", "bf16", 10**400]),
)
NAMES = st.one_of(st.sampled_from(sorted(KNOWN)), st.text(max_size=6))
OBJECTS: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=12,
)
TOPS = st.sampled_from([*all_sections(), *Config.fields_by_key(), *BatchKeys.model_fields])


@settings(many, max_examples=400 * FACTOR)
@given(st.dictionaries(st.one_of(TOPS, NAMES), OBJECTS, max_size=5), st.booleans(), st.sampled_from([None, 1, 3]))
def test_any_object_loads_or_is_refused(config: Any, is_compatible: bool, world: int | None) -> None:
    before = repr(config)
    try:
        examined = examine(config, dp_world_size=world, compatible=is_compatible)
    except ConfigError:
        examined = None  # cannot be read at all
    assert repr(config) == before
    if examined is None or examined.problems:
        with pytest.raises(ConfigError) as caught:
            load_config(config, dp_world_size=world or 1, compatible=is_compatible)
        assert "pydantic" not in str(caught.value)
    elif world is not None:
        loaded = load_config(config, dp_world_size=world, compatible=is_compatible)
        per_rank = loaded.train_micro_batch_size_per_gpu * loaded.gradient_accumulation_steps
        assert loaded.train_batch_size == per_rank * world


@settings(many, max_examples=200 * FACTOR)
@given(st.lists(st.sampled_from(["{", "}", "[", "]", ":", ",", '"', "'", "\n", "#", "fp16", "enabled", "1", "\\"])))
def test_any_text_loads_or_is_refused(pieces: list[str]) -> None:
    text = "{" + "".join(pieces)
    try:
        document = examine(_encoded(text)).document
    except ConfigError:
        return  # the one exception that may come out
    assert document.text == text
