"""``load_inference_config``: what ``init_inference`` was given, read and checked as a training configuration is."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ds_core import log
from ds_core.config.problems import Problem, placed, raise_problems, validate
from ds_core.config.reading import Document, copied, read
from ds_core.config.section import show
from ds_core.config.sections.inference import InferenceSection
from ds_core.config.sections.moved import Moved

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ds_core.config.reading import Source

__all__ = ["load_inference_config"]

ARGUMENTS = "arguments of init_inference"


def load_inference_config(config: Source | None = None, **kwargs: Any) -> InferenceSection:
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
    problems = [Problem.at(keys, "is given twice in one object", "keep one of the two") for keys in document.twice]
    merged, contradictions = _merged(document.raw, copied(kwargs, where=ARGUMENTS))
    section, found = validate(InferenceSection, merged)
    problems += [placed(problem, document, {}) for problem in (*contradictions, *found)]
    raise_problems(problems, where=document.where)
    assert section is not None
    for warning in _deprecated(merged):
        log.log_dist(warning, level=logging.WARNING)
    return section


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
            problems.append(Problem.at((written,), text, "give it in one place"))
    return merged, problems


def _mean_the_same(field: str, one: Any, other: Any) -> bool:
    if one is other:
        return True
    # As the section reads them: torch.half and "fp16" are one dtype.
    sections = [validate(InferenceSection, {field: value})[0] for value in (one, other)]
    return bool(
        one == other if None in sections or field not in InferenceSection.model_fields else sections[0] == sections[1]
    )


def _deprecated(given: Iterable[str]) -> list[str]:
    """Return a sentence for each deprecated key."""
    found = []
    for name in given:
        for marker in InferenceSection.model_fields[InferenceSection.fields_by_key()[name]].metadata:
            if isinstance(marker, Moved):
                found.append(f'{name} is deprecated: write "{marker.section}": {{"{marker.key}": ...}}')
    return [
        *found,
        *(["replace_method is deprecated and has no effect: remove it"] if "replace_method" in given else []),
    ]
