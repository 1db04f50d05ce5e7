"""``examine`` reads a configuration and finds everything wrong with it; ``load_config`` raises that, once."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ds_core import log
from ds_core.config import catalog
from ds_core.config.batch import BatchSizes, resolve_batch
from ds_core.config.checks import check, unresolved
from ds_core.config.config import BatchKeys, Config
from ds_core.config.migrate import Renamed, migrate
from ds_core.config.paths import dotted
from ds_core.config.problems import (
    Problem,
    in_order,
    placed,
    raise_problems,
    unknown_key,
    validate,
    without_consequences,
)
from ds_core.config.reading import Document, Source, copied, read
from ds_core.config.section import AUTO, Section, show
from ds_core.config.unknown import COMPATIBLE_VARIABLE
from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ds_core.config.sections.elasticity import ElasticitySection

__all__ = ["COMPATIBLE_VARIABLE", "Examined", "examine", "find_problems", "load_config"]

BATCH = tuple(BatchKeys.model_fields)
SCHEMA_KEY = "$schema"
"""The key in which a file names its JSON Schema, for editors."""


@dataclass(frozen=True)
class Examined:
    """A configuration and what was found in it."""

    config: Config
    """What it says; defaults in place of what has a problem."""
    problems: tuple[Problem, ...]
    """Everything wrong with it."""
    warnings: tuple[Problem, ...]
    """What compatibility mode dropped, as DeepSpeed would; empty in strict mode."""
    renamed: tuple[Renamed, ...]
    """Deprecated keys that were read as others."""
    document: Document
    """What was given."""
    dp_world_size: int | None
    """Data-parallel ranks that the batch sizes are for; None: they were left open, and ``config`` has 1 for each."""


def load_config(source: Source, *, dp_world_size: int = 1, compatible: bool | None = None) -> Config:
    """Return the configuration in ``source``, checked, with its batch sizes resolved.

    Args:
        source: a mapping, which is neither kept nor changed; the path of a JSON or HJSON file; or urlsafe base64 of
            such text.
        dp_world_size: data-parallel ranks, for the batch sizes.
        compatible: drop keys that DeepSpeed ignores, with one warning each, instead of refusing them; None: as the
            environment variable ``DS_CONFIG_COMPATIBLE`` says, else False.

    Raises:
        ConfigError: lists everything that is wrong.

    >>> load_config({"train_batch_size": 8}, dp_world_size=2).train_micro_batch_size_per_gpu
    4
    """
    examined = examine(source, dp_world_size=dp_world_size, compatible=compatible)
    raise_problems(examined.problems, where=examined.document.where)
    for renamed in examined.renamed:
        log.log_dist(str(renamed), level=logging.WARNING)
    for problem in examined.warnings:
        log.log_dist(f"ignored in compatibility mode: {problem}", level=logging.WARNING)
    return examined.config


def find_problems(source: Source, *, dp_world_size: int | None = None, compatible: bool | None = None) -> list[Problem]:
    """Return what is wrong with the configuration in ``source``, an empty list if nothing is.

    Args:
        source: as for :func:`load_config`.
        dp_world_size: data-parallel ranks. None leaves out what only a run needs: batch sizes that fit together, and
            values in place of ``"auto"``.
        compatible: as for :func:`load_config`.

    Raises:
        ConfigError: ``source`` cannot be read at all.

    >>> [problem.path for problem in find_problems({"fp16": {"enabld": True}})]
    ['fp16.enabld']
    """
    return list(examine(source, dp_world_size=dp_world_size, compatible=compatible).problems)


def examine(source: Source, *, dp_world_size: int | None = None, compatible: bool | None = None) -> Examined:
    """Return the configuration in ``source`` and everything found in it; arguments as for :func:`find_problems`.

    Raises:
        ConfigError: ``source`` cannot be read at all.
    """
    is_compatible = _from_environment() if compatible is None else compatible
    document = read(source)
    twice = [Problem.at(keys, "is given twice in one object", "keep one of the two") for keys in document.twice]
    raw, renamed, old = migrate(document.raw)
    # The keys of these are dropped already.
    warnings = [problem for problem in old if problem.ignorable and is_compatible]
    problems = [problem for problem in old if problem not in warnings]
    config, found = _check(raw, dp_world_size)
    # Dropping a key can uncover another: a section whose keys are all dropped, a rule that runs on valid sections only.
    while is_compatible and (ignored := [problem for problem in found if problem.ignorable]):
        warnings += ignored
        raw = _without(raw, ignored, document.where)
        config, found = _check(raw, dp_world_size)
    written = {row.new: row.old for row in renamed if row.new is not None}
    config._raw, config._where = document.raw, document.where
    config._ignored = tuple(problem.path for problem in warnings)
    config._dropped = {dotted(row.old): row.text for row in renamed if row.new is None}

    def sorted_out(problems: Iterable[Problem]) -> tuple[Problem, ...]:
        found = [placed(problem, document, written) for problem in without_consequences([*problems])]
        return tuple(in_order(found, document))

    return Examined(
        config,
        sorted_out((*twice, *problems, *found)),
        sorted_out(warnings),
        tuple(renamed),
        document,
        dp_world_size,
    )


def _from_environment() -> bool:
    value = os.environ.get(COMPATIBLE_VARIABLE, "")
    if value.lower() in ("1", "true", "yes", "on"):
        return True
    if value.lower() in ("", "0", "false", "no", "off"):
        return False
    raise ConfigError(
        f"got {value!r}, allowed are 1 and 0",
        where=f"environment variable {COMPATIBLE_VARIABLE}",
        fix="set it to 1 for compatibility mode, or unset it",
    )


def _without(raw: dict[str, Any], problems: Iterable[Problem], where: str) -> dict[str, Any]:
    """Return ``raw`` without the keys of ``problems``."""
    left = copied(raw, where=where)
    for problem in problems:
        holder: Any = left
        for key in problem.keys[:-1]:
            holder = holder[key]
        del holder[problem.keys[-1]]
    return left


def _check(raw: dict[str, Any], dp_world_size: int | None) -> tuple[Config, list[Problem]]:
    """Return the configuration in ``raw`` and its problems; with problems, parts of it are defaults."""
    known, further, problems = _sorted_out(raw)
    given = {key: known.pop(key) for key in BATCH if key in known}
    # Elasticity that is on but wrong would have chosen the sizes: that none are given is no problem of its own.
    elastic = raw.get("elasticity")
    is_open = "elasticity" not in further and isinstance(elastic, dict) and bool(elastic.get("enabled"))
    batch, batch_problems = _batch(given, further.get("elasticity"), None if is_open else dp_world_size)
    problems += batch_problems
    sizes = dict(zip(BATCH, (batch.train, batch.micro, batch.accumulation), strict=True))
    config, section_problems = validate(Config, {**known, **sizes})
    problems += section_problems
    invalid: set[str] = {str(problem.keys[0]) for problem in problems if problem.keys}
    if config is None:
        # The rest must still be seen together, so what is wrong by itself gives way to its default.
        good = {key: value for key, value in known.items() if validate(Config, {key: value, **sizes})[0] is not None}
        invalid |= {Config.fields_by_key().get(key, key) for key in known.keys() - good.keys()}
        config, _ = validate(Config, {**good, **sizes})
        if config is None:  # two names of one section, each valid by itself
            return Config.model_validate(sizes), problems
    config._further = further
    problems += check(config, invalid)
    if dp_world_size is not None:
        problems += unresolved(config)
    return config, problems


def _sorted_out(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Section], list[Problem]]:
    """Return the keys that ``Config`` has, the checked sections it has not, and the problems of all other keys."""
    known: dict[str, Any] = {}
    foreign: dict[str, Any] = {}
    further: dict[str, Section] = {}
    problems: list[Problem] = []
    for key, value in raw.items():
        if not isinstance(key, str):
            problems.append(Problem(str(key), f"a key must be text, got {show(key)}", f'write it as "{key}"'))
        elif key == SCHEMA_KEY:
            continue
        elif key not in Config.fields_by_key() and _is_absent(key, value):
            # A section that is null is absent; one that nobody knows is told below, whatever its value.
            foreign |= {} if key in catalog.RARE else {key: value}
        elif key in Config.fields_by_key():
            known[key] = value
        elif key in catalog.RARE:
            section, found = _section(catalog.rare_section(key), key, value)
            problems += found
            further |= {key: section} if section is not None else {}
        else:
            foreign[key] = value
    if foreign:
        from ds_core import registry  # slow to import, and few configurations need it

        own = registry.names("config")
        for key, value in foreign.items():
            if key not in own:
                problems.append(unknown_key(Config, (key,), value, others=(*catalog.RARE, *own)))
                continue
            section, found = _section(catalog.plugin_section(key), key, {} if value in (None, AUTO) else value)
            problems += found
            further |= {key: section} if section is not None else {}
    return known, further, problems


def _is_absent(key: str, value: Any) -> bool:
    return (
        value is None or (isinstance(value, str) and value == AUTO) or (value is False and key in catalog.OFF_IF_FALSE)
    )


def _section(model: type[Section], name: str, value: Any) -> tuple[Section | None, list[Problem]]:
    section, problems = validate(model, value, path=(name,))
    # That it is not built is told beside what is wrong in it, not only once that is mended.
    is_switched_on = isinstance(value, dict) and value.get("enabled") is True and "enabled" in model.model_fields
    is_on = is_switched_on if section is None else section.is_on()
    if model.comes_with and is_on and not _is_carried_out(name):
        fix = f'remove "{name}"'
        if "enabled" in model.model_fields:
            fix += ', or set its "enabled" to false'
        text = f"this section is not built yet; it comes with a later release of {model.comes_with}"
        problems.append(Problem.at((name,), text, fix))
    return section, problems


def _is_carried_out(name: str) -> bool:
    from ds_core import registry

    # A monitor is called like its section; a stranger may have written the one that we have not.
    return name in registry.names("monitor")


def _batch(
    given: dict[str, Any], elasticity: Section | None, dp_world_size: int | None
) -> tuple[BatchSizes, list[Problem]]:
    """Return the resolved sizes; where they are not asked for or wrong, sizes that only fill the place."""
    filler = BatchSizes(1, 1, 1, 1)
    keys, problems = validate(BatchKeys, given)
    if elasticity is not None and elasticity.is_on():
        sizes, found = _elastic(given, elasticity, dp_world_size)  # type: ignore[arg-type]
        return sizes or filler, problems + found
    if dp_world_size is None:
        return filler, problems
    problems += [
        Problem.at((key,), '"auto" was not replaced by a value', "give a number")
        for key, value in given.items()
        if value == AUTO
    ]
    if keys is None or problems:
        return filler, problems
    try:
        return resolve_batch(
            keys.train_batch_size, keys.train_micro_batch_size_per_gpu, keys.gradient_accumulation_steps, dp_world_size
        ), []
    except ConfigError as error:
        path, _, text = error.what.partition(": ")
        return filler, [Problem(path, text, error.fix, (path,) if path in BATCH else ())]


def _elastic(
    given: dict[str, Any], section: ElasticitySection, dp_world_size: int | None
) -> tuple[BatchSizes | None, list[Problem]]:
    """Return the sizes that ``elasticity`` chooses, where it can."""
    from ds_core.config.elastic import ElasticityError, check_elasticity, check_scheduler, elastic_sizes

    contradictions = check_elasticity(section)
    problems = [*contradictions, *check_scheduler(section, os.environ)]
    if not section.ignore_non_elastic_batch_info:
        fix = 'remove it, or set "ignore_non_elastic_batch_info" of "elasticity" to true'
        problems += [
            Problem.at((key,), f"got {show(value)}, but elasticity.enabled is true and chooses the batch sizes", fix)
            for key, value in given.items()
        ]
    if contradictions:
        return None, problems
    try:
        plan = elastic_sizes(section, dp_world_size)
    except ElasticityError as error:
        path, _, text = error.what.partition(": ")
        return None, [*problems, Problem.at(tuple(path.split(".")), text, error.fix)]
    if plan.micro is None or plan.accumulation is None or dp_world_size is None:
        return None, problems
    return BatchSizes(plan.train, plan.micro, plan.accumulation, dp_world_size), problems
