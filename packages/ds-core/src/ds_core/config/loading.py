"""``examine`` reads a configuration and finds everything wrong with it; ``load_config`` raises that, once.

Note: seeing all at once. What is wrong by itself hides what is wrong with the rest: a section with one bad key is no
section. So what has a problem is put right as its author probably meant it (a misspelt key gets its right name) or else
left out, until the rest is valid by itself. Then the rules across keys run, except those that read what was bad.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ds_core import log
from ds_core.config import catalog
from ds_core.config.batch import BatchSizes, resolve_batch
from ds_core.config.checks import check, unresolved
from ds_core.config.config import BatchKeys, Config
from ds_core.config.effects import unread_options
from ds_core.config.mending import is_consequence, put_right
from ds_core.config.migrate import Renamed, migrate
from ds_core.config.paths import dotted
from ds_core.config.problems import MANY, Problem, in_order, placed, raise_problems, unknown_key, validate
from ds_core.config.reading import Document, Source, copied, read
from ds_core.config.section import AUTO, Section, show
from ds_core.config.unknown import COMPATIBLE_VARIABLE
from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ds_core.config.paths import Path
    from ds_core.config.sections.elasticity import ElasticitySection

__all__ = ["COMPATIBLE_VARIABLE", "Examined", "examine", "find_problems", "load_config"]

BATCH = tuple(BatchKeys.model_fields)
FILLER = BatchSizes(1, 1, 1, 1)
"""Sizes that only fill the place, where none are asked for or they are wrong."""
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
    migrated: Mapping[str, Any]
    """The same in today's words."""
    dp_world_size: int | None
    """Data-parallel ranks that the batch sizes are for; None: they were left open, and ``config`` has 1 for each."""


def load_config(source: Source | Document, *, dp_world_size: int = 1, compatible: bool | None = None) -> Config:
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
    for path, text in unread_options(examined.config):
        log.log_dist(f"{path}: {text}", level=logging.WARNING)
    return examined.config


def find_problems(
    source: Source | Document, *, dp_world_size: int | None = None, compatible: bool | None = None
) -> list[Problem]:
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


def examine(source: Source | Document, *, dp_world_size: int | None = None, compatible: bool | None = None) -> Examined:
    """Return the configuration in ``source`` and everything found in it; arguments as for :func:`find_problems`.

    Raises:
        ConfigError: ``source`` cannot be read at all.
    """
    is_compatible = _from_environment() if compatible is None else compatible
    document = read(source)
    migrated, renamed, old = migrate(document.raw)
    # The keys of these are dropped already.
    old_ignored = [problem for problem in old if problem.ignorable and is_compatible]
    found = _check(copied(migrated, where=document.where), dp_world_size, is_compatible)
    written = {row.new: row.old for row in renamed if row.new is not None}
    problems = [
        placed(problem, document, {**written, **found.guessed})
        for problem in (*document.duplicates(), *old, *found.problems)
    ]
    warnings = [placed(problem, document, written) for problem in (*old_ignored, *found.warnings)]
    return Examined(
        found.config.of(
            document.raw,
            where=document.where,
            ignored=tuple(problem.path for problem in warnings),
            dropped={dotted(row.old): row.text for row in renamed if row.new is None},
        ),
        tuple(in_order([problem for problem in problems if problem not in warnings], document)),
        tuple(in_order(warnings, document)),
        tuple(renamed),
        document,
        migrated,
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


@dataclass
class _Found:
    config: Config
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    guessed: dict[Path, Path] = field(default_factory=dict)
    """Where a misspelt or misplaced key was read -> where it was written."""


def _check(raw: dict[str, Any], dp_world_size: int | None, is_compatible: bool) -> _Found:
    """Find everything wrong with ``raw``, in which what is wrong is put right or left out; see the note above."""
    found = _Found(Config.model_validate(_sizes(FILLER)))
    while True:
        parts = _parts(raw)
        wrong = parts.problems
        is_last = not wrong
        if is_last:
            found.config, wrong = _together(parts, found.problems, dp_world_size)
            ignored = [problem for problem in wrong if problem.ignorable and is_compatible]
            # What DeepSpeed ignores is taken out, and the rest found again without it.
            is_last, wrong = not ignored, ignored or wrong
        new = list({(problem.keys, problem.text): problem for problem in wrong}.values())
        told = [*found.problems, *new]
        new = [problem for problem in new if not is_consequence(problem, told)]
        found.warnings += [problem for problem in new if problem.ignorable and is_compatible]
        found.problems += [problem for problem in new if not (problem.ignorable and is_compatible)]
        if is_last:
            return found
        put_right(raw, wrong, None if is_compatible else found.guessed)


@dataclass
class _Parts:
    """A configuration taken apart: each part valid by itself, if there are no problems."""

    known: dict[str, Any]
    """What ``Config`` declares, as it was written."""
    batch: BatchKeys
    unresolved: list[str]
    """Batch sizes that are ``"auto"``."""
    further: dict[str, Section]
    """Sections that ``Config`` does not declare."""
    problems: list[Problem]


def _parts(raw: Mapping[str, Any]) -> _Parts:
    known: dict[str, Any] = {}
    foreign: dict[str, Any] = {}
    further: dict[str, Section] = {}
    problems: list[Problem] = []
    for key, value in raw.items():
        if not isinstance(key, str):
            problems.append(Problem((str(key),), f"a key must be text, got {show(key)}", f'write it as "{key}"'))
        elif key in Config.fields_by_key():
            known[key] = value
        elif key not in catalog.RARE:
            foreign |= {} if key == SCHEMA_KEY else {key: value}
        elif not _is_absent(key, value):
            problems += _read_section(catalog.rare_section(key), key, value, further)
    if foreign:
        from ds_core import registry  # slow to import, and few configurations need it

        own = registry.names("config")
        unknown = [key for key in foreign if key not in own]
        others = (*catalog.RARE, *own)
        problems += [
            unknown_key(Config, (key,), foreign[key], others=others, advise=index < MANY)
            for index, key in enumerate(unknown)
        ]
        for key in foreign.keys() & set(own):
            value = {} if _is_absent(key, foreign[key]) else foreign[key]
            problems += _read_section(catalog.plugin_section(key), key, value, further)
    given = {key: known.pop(key) for key in BATCH if key in known}
    batch, of_batch = validate(BatchKeys, given)
    _, of_config = validate(Config, {**known, **_sizes(FILLER)})
    open_sizes = [key for key, value in given.items() if isinstance(value, str) and value == AUTO]
    return _Parts(known, batch or BatchKeys(), open_sizes, further, [*problems, *of_batch, *of_config])


def _sizes(batch: BatchSizes) -> dict[str, int]:
    return dict(zip(BATCH, (batch.train, batch.micro, batch.accumulation), strict=True))


def _together(parts: _Parts, earlier: Sequence[Problem], dp_world_size: int | None) -> tuple[Config, list[Problem]]:
    """Return the configuration that valid ``parts`` make, and the problems that show only when they are seen together.

    Args:
        parts: without problems of their own.
        earlier: problems of what was taken out of them.
        dp_world_size: data-parallel ranks; None: the batch sizes are left open.
    """
    bad = [problem.keys for problem in earlier if problem.kind != "unknown"]
    # A size that is wrong was given; elasticity that is too wrong to be read would have chosen them all.
    is_open = dp_world_size is None or any(keys[0] in BATCH for keys in bad if keys)
    is_open |= "elasticity" not in parts.further and any(problem.keys[:1] == ("elasticity",) for problem in earlier)
    batch, problems = _batch(parts, None if is_open else dp_world_size)
    config = Config.model_validate({**parts.known, **_sizes(batch)}).with_sections(parts.further)
    for name, section in parts.further.items():
        problems += [found for found in _not_built(name, type(section)) if section.is_on() and found not in earlier]
    problems += check(config, bad)
    if dp_world_size is not None:
        problems += unresolved(config)
    return config, problems


def _is_absent(key: str, value: Any) -> bool:
    return (
        value is None or (isinstance(value, str) and value == AUTO) or (value is False and key in catalog.OFF_IF_FALSE)
    )


def _read_section(model: type[Section], name: str, value: Any, into: dict[str, Section]) -> list[Problem]:
    """Add section ``name``, if it is valid, and return its problems."""
    section, problems = validate(model, value, path=(name,))
    if section is not None:
        into[name] = section
    elif model.is_switched_on(value) and not model.model_fields["enabled"].default:
        # Told beside what is wrong in it, not only once that is mended.
        problems += _not_built(name, model)
    return problems


def _not_built(name: str, model: type[Section]) -> list[Problem]:
    """Return the problem of a section that is on, if nothing carries it out yet."""
    if not model.comes_with or _is_carried_out(name):
        return []
    fix = f'remove "{name}"'
    if "enabled" in model.model_fields:
        fix += ', or set its "enabled" to false'
    text = f"this section is not built yet; it comes with a later release of {model.comes_with}"
    return [Problem((name,), text, fix)]


def _is_carried_out(name: str) -> bool:
    from ds_core import registry

    # A monitor is called like its section; a stranger may have written the one that we have not.
    return name in registry.names("monitor")


def _batch(parts: _Parts, dp_world_size: int | None) -> tuple[BatchSizes, list[Problem]]:
    """Return the resolved sizes, or fillers and what is wrong with those given."""
    keys = parts.batch
    elasticity: Any = parts.further.get("elasticity")
    if elasticity is not None and elasticity.is_on():
        sizes, problems = _elastic(keys.given(), elasticity, dp_world_size)
        return sizes or FILLER, problems
    if dp_world_size is None:
        return FILLER, []
    if parts.unresolved:
        return FILLER, [
            Problem((key,), '"auto" was not replaced by a value', "give a number") for key in parts.unresolved
        ]
    try:
        return resolve_batch(
            keys.train_batch_size, keys.train_micro_batch_size_per_gpu, keys.gradient_accumulation_steps, dp_world_size
        ), []
    except ConfigError as error:
        path, _, text = error.what.partition(": ")
        if path not in BATCH:  # the caller's number of ranks
            raise
        return FILLER, [Problem((path,), text, error.fix)]


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
            Problem((key,), f"got {show(value)}, but elasticity.enabled is true and chooses the batch sizes", fix)
            for key, value in given.items()
        ]
    if contradictions:
        return None, problems
    try:
        plan = elastic_sizes(section, dp_world_size)
    except ElasticityError as error:
        path, _, text = error.what.partition(": ")
        return None, [*problems, Problem(tuple(path.split(".")), text, error.fix)]
    if plan.micro is None or plan.accumulation is None or dp_world_size is None:
        return None, problems
    return BatchSizes(plan.train, plan.micro, plan.accumulation, dp_world_size), problems
