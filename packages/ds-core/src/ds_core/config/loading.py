"""``load_config``: read, check everything, and raise once."""

from __future__ import annotations

from typing import Any

from ds_core.config import not_built
from ds_core.config.batch import BatchSizes, resolve_batch
from ds_core.config.checks import check, unresolved
from ds_core.config.config import BatchKeys, Config
from ds_core.config.problems import Problem, dotted, raise_problems, unknown_key, validate
from ds_core.config.reading import Document, Source, read
from ds_core.config.section import AUTO, Section, show
from ds_core.errors import ConfigError, PluginError

__all__ = ["find_problems", "load_config"]

BATCH = tuple(BatchKeys.model_fields)


def load_config(source: Source, *, dp_world_size: int = 1) -> Config:
    """Return the configuration in ``source``, checked, with its batch sizes resolved.

    Args:
        source: a mapping, which is neither kept nor changed; the path of a JSON or HJSON file; or urlsafe base64 of
            such text.
        dp_world_size: data-parallel ranks, for the batch sizes.

    Raises:
        ConfigError: lists everything that is wrong.

    >>> load_config({"train_batch_size": 8}, dp_world_size=2).train_micro_batch_size_per_gpu
    4
    """
    document = read(source)
    config, problems = _load(document.raw, dp_world_size)
    raise_problems([*_given_twice(document), *problems], where=document.where)
    config._raw, config._where = document.raw, document.where
    return config


def find_problems(source: Source, *, dp_world_size: int | None = None) -> list[Problem]:
    """Return what is wrong with the configuration in ``source``, an empty list if nothing is.

    Args:
        source: as for :func:`load_config`.
        dp_world_size: data-parallel ranks. None leaves out what only a run needs: batch sizes that fit together, and
            values in place of ``"auto"``.

    Raises:
        ConfigError: ``source`` cannot be read at all.

    >>> [problem.path for problem in find_problems({"fp16": {"enabld": True}})]
    ['fp16.enabld']
    """
    document = read(source)
    return [*_given_twice(document), *_load(document.raw, dp_world_size)[1]]


def _given_twice(document: Document) -> list[Problem]:
    return [Problem(dotted(keys), "is given twice in one object", "keep one of the two") for keys in document.twice]


def _load(raw: dict[str, Any], dp_world_size: int | None) -> tuple[Config, list[Problem]]:
    """Return the configuration in ``raw`` and its problems; with problems, parts of it are defaults."""
    known, plugins, problems = _sorted_out(raw)
    batch, batch_problems = _batch({key: known.pop(key) for key in BATCH if key in known}, dp_world_size)
    problems += batch_problems
    sizes = dict(zip(BATCH, (batch.train, batch.micro, batch.accumulation), strict=True))
    config, section_problems = validate(Config, {**known, **sizes})
    problems += section_problems
    invalid: set[str] = set()
    if config is None:
        # The rest must still be seen together, so what is wrong by itself gives way to its default.
        good = {key: value for key, value in known.items() if validate(Config, {key: value, **sizes})[0] is not None}
        invalid = {Config.fields_by_key().get(key, key) for key in known.keys() - good.keys()}
        config, _ = validate(Config, {**good, **sizes})
        if config is None:  # two names of one section, each valid by itself
            return Config.model_validate(sizes), problems
    problems += check(config, invalid)
    if dp_world_size is not None:
        problems += unresolved(config)
    config._plugin_sections = plugins
    return config, problems


def _sorted_out(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Section], list[Problem]]:
    """Return the keys that ``Config`` has, the checked sections of plugins, and the problems of all other keys."""
    known: dict[str, Any] = {}
    foreign: dict[str, Any] = {}
    plugins: dict[str, Section] = {}
    problems: list[Problem] = []
    for key, value in raw.items():
        if not isinstance(key, str):
            problems.append(Problem(str(key), f"a key must be text, got {show(key)}", f'write it as "{key}"'))
        elif key in Config.fields_by_key():
            known[key] = value
        elif key in not_built.SECTIONS:
            problems += _not_built(key, value)
        else:
            foreign[key] = value
    if foreign:
        from ds_core import registry  # slow to import, and few configurations need it

        own = registry.names("config")
        for key, value in foreign.items():
            if key not in own:
                problems.append(unknown_key(Config, (key,), value, others=(*not_built.SECTIONS, *own)))
                continue
            section, found = validate(_plugin_class(key), {} if value is None else value, path=(key,))
            problems += found
            plugins |= {key: section} if section is not None else {}
    return known, plugins, problems


def _not_built(name: str, value: Any) -> list[Problem]:
    if not_built.is_off(name, value):
        return []
    fix = f'remove "{name}"'
    if isinstance(value, dict) and "enabled" in value:
        fix += ', or set its "enabled" to false'
    package, _ = not_built.SECTIONS[name]
    return [Problem(name, f"this section is not built yet; it comes with a later release of {package}", fix)]


def _plugin_class(name: str) -> type[Section]:
    from ds_core import registry

    found = registry.load("config", name)
    if not (isinstance(found, type) and issubclass(found, Section)):
        raise PluginError(
            f"the class of a section must derive from ds_core.config.Section, got {found!r}",
            where=f"entry point {name!r} of group 'ds_core.config'",
            fix="report it to the package's authors",
        )
    return found


def _batch(given: dict[str, Any], dp_world_size: int | None) -> tuple[BatchSizes, list[Problem]]:
    """Return the resolved sizes; where they are not asked for or wrong, sizes that only fill the place."""
    filler = BatchSizes(1, 1, 1, 1)
    keys, problems = validate(BatchKeys, given)
    if dp_world_size is None:
        return filler, problems
    problems += [
        Problem(dotted((key,)), '"auto" was not replaced by a value', "give a number")
        for key, value in given.items()
        if value == AUTO
    ]
    if keys is None or problems:
        return filler, problems
    try:
        sizes = keys.train_batch_size, keys.train_micro_batch_size_per_gpu, keys.gradient_accumulation_steps
        return resolve_batch(*sizes, dp_world_size), []
    except ConfigError as error:
        path, _, text = error.what.partition(": ")
        return filler, [Problem(path, text, error.fix)]
