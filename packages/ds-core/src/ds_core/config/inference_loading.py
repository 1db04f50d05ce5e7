"""``load_inference_config``: what ``init_inference`` was given, read and checked as a training configuration is."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ds_core import log
from ds_core.config.migrate import Renamed, migrate
from ds_core.config.problems import Problem, placed, raise_problems, validate
from ds_core.config.reading import Document, copied, read
from ds_core.config.section import show
from ds_core.config.sections.inference import InferenceSection

if TYPE_CHECKING:
    from ds_core.config.reading import Source

__all__ = ["load_inference_config"]

ARGUMENTS = "arguments of init_inference"


def load_inference_config(config: Source | Document | None = None, **kwargs: Any) -> InferenceSection:
    """Return the configuration of an inference engine, checked.

    A key may be in ``config`` or among ``kwargs``; in both only if they mean the same. DeepSpeed's documentation says
    that arguments win, its code refuses, and so does this.

    Args:
        config: a mapping, which is neither kept nor changed; the path of a JSON or HJSON file; or urlsafe base64 of
            such text. None: everything is in ``kwargs``.
        kwargs: keys of the configuration.

    Raises:
        ConfigError: lists everything that is wrong.

    >>> load_inference_config({"tensor_parallel": {"tp_size": 2}}, dtype="half").dtype
    'float16'
    """
    document = Document({}, ARGUMENTS) if config is None else read(config)
    merged, contradictions = _merged(document.raw, copied(kwargs, where=ARGUMENTS))
    data, renamed, old = _migrated(merged)
    section, found = validate(InferenceSection, data)
    written = {row.new: row.old for row in renamed if row.new is not None}
    problems = [placed(problem, document, written) for problem in (*contradictions, *old, *found)]
    raise_problems([*document.duplicates(), *problems], where=document.where)
    assert section is not None
    for row in renamed:
        log.log_dist(str(row), level=logging.WARNING)
    return section


def _migrated(data: dict[str, Any]) -> tuple[dict[str, Any], list[Renamed], list[Problem]]:
    """Return ``data`` in today's words, what was renamed, and old keys that cannot be: those of a training config."""
    result, renamed, problems = migrate({"inference": data})
    # There the section has a name, here it is the whole.
    rows = [replace(row, old=row.old[1:], new=row.new and row.new[1:]) for row in renamed]
    return result["inference"], rows, [replace(problem, keys=problem.keys[1:]) for problem in problems]


def _merged(given: dict[str, Any], arguments: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the keys of both, and a problem for each argument that says something else than ``given``."""
    merged, problems = dict(given), []
    fields = InferenceSection.fields_by_key()
    for name, value in arguments.items():
        # Two names of one field are the same key.
        field = fields.get(name, name)
        written = next((key for key in given if key == name or fields.get(key) == field), None)
        if written is None:
            merged[name] = value
        elif not _mean_the_same(field, given[written], value):
            text = (
                f"got {show(value)} as an argument of init_inference, but {show(given[written])} in the configuration"
            )
            problems.append(Problem((written,), text, "give it in one place"))
    return merged, problems


def _mean_the_same(field: str, one: Any, other: Any) -> bool:
    if one is other:
        return True
    # As the section reads them: torch.half and "fp16" are one dtype.
    sections = [validate(InferenceSection, {field: value})[0] for value in (one, other)]
    return bool(
        one == other if None in sections or field not in InferenceSection.model_fields else sections[0] == sections[1]
    )
