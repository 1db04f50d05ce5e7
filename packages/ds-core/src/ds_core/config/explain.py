"""``explain`` tells every effective value of a configuration and where it came from (P05)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ds_core.config import catalog
from ds_core.config.config import BatchKeys, Config
from ds_core.config.effects import SWITCHES
from ds_core.config.notes import Note, notes_of
from ds_core.config.origins import Origins, Setting, given_default
from ds_core.config.paths import fields_along, is_open, sections_of
from ds_core.config.section import AUTO, NoEffect, NotBuilt, Secret, Section
from ds_core.config.showing import HIDDEN, is_secret

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pydantic.fields import FieldInfo

    from ds_core.config.loading import Examined
    from ds_core.config.paths import Path
    from ds_core.config.problems import Problem

__all__ = ["Explanation", "Group", "explain"]

TRAIN, MICRO, ACCUMULATION = BATCH = tuple(BatchKeys.model_fields)
AS_WRITTEN = "has problems; as written"


@dataclass(frozen=True)
class Group:
    """A section, or the keys at the top level."""

    name: str
    """Its key, empty for the top level."""
    settings: tuple[Setting, ...]
    """Every value in it; of a section that is off, unless all were asked for, only those that were written."""
    state: str = ""
    """Why its values do nothing, or are shown as they were written; empty where they hold."""
    left_out: tuple[Setting, ...] = ()
    """Defaults that change nothing here: no effect in this configuration, or the one value that is built."""


@dataclass(frozen=True)
class Explanation:
    """Every effective value of a configuration, and what to know about it."""

    where: str
    """What is explained: ``config dict``, ``base64 text``, or the path of the file."""
    groups: tuple[Group, ...]
    """The values: the top level first, then sections that were given or are on."""
    off: tuple[str, ...]
    """Sections that were not given, which are off or all at their defaults."""
    notes: tuple[Note, ...]
    """Deprecated and dropped keys, keys without effect, and what ``initialize`` will need."""
    problems: tuple[Problem, ...]
    """Everything wrong with the configuration."""

    @property
    def settings(self) -> Iterator[Setting]:
        """All values shown, in order."""
        for group in self.groups:
            yield from group.settings

    @property
    def left_out(self) -> Iterator[Setting]:
        """All defaults left out, in order."""
        for group in self.groups:
            yield from group.left_out


def explain(examined: Examined, *, all_keys: bool = False) -> Explanation:
    """Return every effective value of ``examined`` with its origin.

    Args:
        examined: what ``ds_core.config.loading.examine`` returned. Its ``dp_world_size`` decides whether the batch
            sizes that were left out are shown.
        all_keys: also the sections that are off, with all their keys, and defaults that change nothing.

    >>> from ds_core.config.loading import examine
    >>> explanation = explain(examine({"train_batch_size": 8, "gradient_accumulation_steps": 2}, dp_world_size=2))
    >>> [setting.origin for setting in explanation.settings][:3]
    ['caller', 'derived: 8 / (2 x 2 ranks)', 'caller']
    """
    examined = _without_guesses(examined)
    config, origins = examined.config, Origins(examined)
    raw = origins.kept(examined.migrated, ())
    groups = [_group_of("", _top_level(examined, raw, origins), Config, config, all_keys)]
    off = []
    for name in _section_names(config):
        if raw.get(name) in (None, AUTO) and not all_keys and not config.enables(name):
            off.append(name)
        else:
            groups += _group(examined, name, raw.get(name), origins, all_keys)
    notes = notes_of(examined, origins, groups)
    return Explanation(examined.document.where, tuple(groups), tuple(off), tuple(notes), examined.problems)


def _without_guesses(examined: Examined) -> Examined:
    """Return ``examined`` with a configuration that has nothing under another name than it was written."""
    if all(problem.meant is None for problem in examined.problems):
        return examined
    from ds_core.config.loading import examine

    # Compatibility mode leaves out what is misspelt; what else it leaves out has a problem, and is shown as written.
    plain = examine(examined.migrated, dp_world_size=examined.dp_world_size, compatible=True)
    return replace(examined, config=plain.config)


def _section_names(config: Config) -> list[str]:
    declared = list(sections_of(Config))
    return [*declared, *sorted({*catalog.RARE, *config.sections} - {*declared})]


def _group(examined: Examined, name: str, raw: Any, origins: Origins, all_keys: bool) -> Iterator[Group]:
    config = examined.config
    section = config.section(name)
    model = sections_of(Config)[name] if section is None else type(section)
    wrong = {problem.keys for problem in examined.problems}
    if raw not in (None, AUTO) and any(keys[:1] == (name,) for keys in wrong):
        # What has a problem may be left out of the configuration.
        section = _valid(model, raw)
        if section is None:
            as_written = [_marked(setting, wrong, origins) for setting in origins.as_written(raw, (name,))]
            yield _group_of(name, as_written, model, config, all_keys, AS_WRITTEN)
            return
    if section is None:  # an optional one that was not given
        return
    settings = list(origins.section(section, raw, (name,), (name,)))
    if name in ("optimizer", "scheduler"):
        settings = list(_arguments(settings, section, raw, origins))
    state = "has a problem" if (name,) in wrong else _why_off(config, name, section)
    if state and not all_keys:
        settings = [setting for setting in settings if setting.is_given]
    settings = [_marked(_derived(setting, config), wrong, origins) for setting in settings]
    yield _group_of(name, settings, model, config, all_keys, state)


def _group_of(
    name: str, settings: Iterable[Setting], model: type[Section], config: Config, all_keys: bool, state: str = ""
) -> Group:
    """Return the group of ``settings``, without the defaults that change nothing, unless all keys were asked for."""
    shown: list[Setting] = []
    left_out: list[Setting] = []
    for setting in settings:
        markers = [marker for info in _fields(setting.keys, model, config) for marker in info.metadata]
        is_default = setting.kind in ("default", "derived") and not setting.is_given
        is_left_out = is_default and not all_keys and any(_changes_nothing(marker, config) for marker in markers)
        (left_out if is_left_out else shown).append(_without_secret(setting, markers))
    return Group(name, tuple(shown), state, tuple(left_out))


def _changes_nothing(marker: Any, config: Config) -> bool:
    """Return whether a key with ``marker`` has no effect in ``config``, or takes one value only."""
    return isinstance(marker, NotBuilt) or (isinstance(marker, NoEffect) and marker.holds(config))


def _without_secret(setting: Setting, markers: Iterable[Any]) -> Setting:
    # Nobody declares what is misspelt, or for a plugin: there the name of the key decides.
    is_hidden = any(isinstance(marker, Secret) for marker in markers) or any(map(is_secret, setting.keys))
    has_value = not (setting.value is None or isinstance(setting.value, bool))
    return replace(setting, value=HIDDEN) if is_hidden and has_value else setting


def _fields(keys: Path, model: type[Section], config: Config) -> Iterator[FieldInfo]:
    """Yield the fields along ``keys``: a path in ``model``, which is a section, or the whole configuration."""
    if keys[:2] in (("optimizer", "params"), ("scheduler", "params")) and len(keys) > 2:
        from ds_core.config.sections.arguments import arguments_of

        section = getattr(config, str(keys[0]))
        arguments = None if section is None else arguments_of(str(keys[0]), section.type)
        return fields_along(arguments, keys[2:]) if arguments is not None else iter(())
    return fields_along(model, keys if model is Config else keys[1:])


def _valid(model: type[Section], raw: Any) -> Section | None:
    """Return ``raw`` as a ``model``, None where it is not valid by itself."""
    try:
        return model.model_validate(raw)
    except ValidationError:  # its problems are told already, and wording them takes time
        return None


def _marked(setting: Setting, wrong: set[Path], origins: Origins) -> Setting:
    """Return ``setting``, with its problem in place of its origin if it has one."""
    starts = (setting.keys[:length] for length in range(2, len(setting.keys) + 1))
    if setting.kind != origins.kind or wrong.isdisjoint(starts):
        return setting
    return replace(setting, kind="open", origin=f"{setting.origin}, has a problem")


def _why_off(config: Config, name: str, section: Section) -> str:
    switch = next((name for name in SWITCHES if name in type(section).model_fields), None)
    if config.enables(name) or not (switch or section.comes_with):
        return ""
    # The path of a stage would repeat what the heading begins with.
    return f"stage is {getattr(section, switch)}" if switch == "stage" else section.why_off() or "off"


def _derived(setting: Setting, config: Config) -> Setting:
    if setting.keys == ("zero_optimization", "overlap_comm") and setting.kind in ("default", "derived"):
        return replace(setting, kind="derived", origin=f"derived: stage {config.zero_optimization.stage}")
    if setting.keys == ("checkpoint", "engine") and setting.value is None:
        value, by = config.plugin("checkpoint"), config.checkpoint.chosen_by
        if by is not None:
            return replace(setting, value=value, kind="derived", origin=f"derived: {by}")
        # Null is a value of the key's own, so it counts as written.
        return replace(setting, value=value) if setting.kind == "default" else given_default(setting.keys, value, None)
    return setting


def _arguments(settings: list[Setting], section: Any, raw: Any, origins: Origins) -> Iterator[Setting]:
    """Yield ``settings`` of an optimizer or a schedule, with the arguments its constructor fills in."""
    from ds_core.config.sections.arguments import arguments_of

    name = str(settings[0].keys[0])
    model = arguments_of(name, section.type)
    given = section.params if isinstance(raw, Mapping) else {}
    for setting in settings:
        if setting.keys[1] != "params":
            yield origins.open(setting.keys, setting.value, "needs a value") if is_open(setting.value) else setting
    for key, value in given.items():
        yield _argument((name, "params", str(key)), value, origins)
    if model is None:
        if not given:
            yield from (setting for setting in settings if setting.keys[1] == "params")
        return
    written = {model.fields_by_key().get(key) for key in given}
    for field, info in model.model_fields.items():
        if field not in written and not info.is_required():
            keys = (name, "params", info.serialization_alias or field)
            yield Setting(keys, info.get_default(call_default_factory=True), "default", "default")


def _argument(keys: tuple[str, str, str], value: Any, origins: Origins) -> Setting:
    return origins.open(keys, value, "needs a value") if is_open(value) else origins.written(keys, value)


def _top_level(examined: Examined, raw: Mapping[str, Any], origins: Origins) -> Iterator[Setting]:
    """Yield the settings of the keys that are no section, the batch sizes first."""
    yield from _batch(examined, raw, origins)
    wrong = {problem.keys[:1] for problem in examined.problems}
    for key, info in Config.model_fields.items():
        if key in BATCH or key in sections_of(Config):
            continue
        value = getattr(examined.config, key)
        if key not in raw:
            yield Setting((key,), value, "default", "default")
        elif (key,) in wrong:
            yield origins.open((key,), raw[key], "has a problem")
        elif raw[key] == AUTO or (raw[key] is None and info.get_default() is not None):
            yield given_default((key,), value, raw[key])
        else:
            yield origins.written((key,), value)


def _batch(examined: Examined, raw: Mapping[str, Any], origins: Origins) -> Iterator[Setting]:
    config, world = examined.config, examined.dp_world_size
    given = {key: raw[key] for key in BATCH if raw.get(key) is not None}
    elasticity = config.sections.get("elasticity")
    is_elastic = elasticity is not None and elasticity.is_on()
    tops = {str(problem.keys[0]) for problem in examined.problems if problem.keys}
    wrong = tops & {*BATCH, *(["elasticity"] if is_elastic else [])}
    lacks = "see the problems" if wrong - {key for key in given if given[key] == AUTO} else ""
    if not lacks and AUTO in given.values():
        lacks = 'waits for "auto"'
    elif not lacks and not is_elastic and not {TRAIN, MICRO} & given.keys():
        lacks = "needs a number"
    is_complete = not lacks
    if is_complete and world is None:
        lacks = "needs --world"
    for key in BATCH:
        if given.get(key) == AUTO:
            yield origins.open((key,), AUTO, "needs a number")
        elif key in wrong and key in given:
            yield origins.open((key,), given[key], "has a problem")
        elif key in given and not is_elastic:
            # Without a world the configuration only has fillers.
            yield origins.written((key,), getattr(BatchKeys.model_validate({key: given[key]}), key))
        elif key == ACCUMULATION and len(given) == 1 and is_complete and not is_elastic:
            yield Setting((key,), 1, "default", "default")
        elif lacks:
            yield Setting((key,), None, "open", lacks)
        elif is_elastic:
            instead = f", not {origins.place((key,))}" if key in given else ""
            yield Setting((key,), getattr(config, key), "derived", f"derived: elasticity{instead}")
        else:
            yield Setting((key,), getattr(config, key), "derived", f"derived: {_equation(config, key, given, world)}")


def _equation(config: Config, key: str, given: Mapping[str, Any], world: int | None) -> str:
    """Return what the batch size ``key`` was computed from, in numbers."""
    train, micro, accumulation = (getattr(config, name) for name in BATCH)
    ranks = f"{world} rank{'' if world == 1 else 's'}"
    if key == TRAIN:
        return f"{micro} x {accumulation} x {ranks}"
    if key == ACCUMULATION:
        return f"{train} / ({micro} x {ranks})"
    return f"{train} / ({accumulation} x {ranks})" if ACCUMULATION in given else f"{train} / {ranks}"
