"""Which arguments ``optimizer.params`` and ``scheduler.params`` may hold, by the section's ``type``.

They are checked before torch is loaded, and passed on to the constructor as they were written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ds_core.config.paths import is_open
from ds_core.config.problems import Problem, validate
from ds_core.config.sections.optimizer_arguments import (
    AdagradArguments,
    AdamArguments,
    LambArguments,
    LionArguments,
    MuAdamArguments,
    MuAdamWArguments,
    MuonArguments,
    MuSgdArguments,
    OnebitAdamArguments,
    OnebitLambArguments,
    ZeroOneAdamArguments,
)
from ds_core.config.sections.schedule_arguments import (
    LRRangeTestArguments,
    OneCycleArguments,
    WarmupCosineLRArguments,
    WarmupDecayLRArguments,
    WarmupLRArguments,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ds_core.config.section import Section

__all__ = ["ARGUMENTS", "argument_problems", "arguments_of"]

ARGUMENTS: dict[str, dict[str, type[Section]]] = {
    "optimizer": {
        "AdamW": AdamArguments,
        "Adam": AdamArguments,
        "Adagrad": AdagradArguments,
        "Lamb": LambArguments,
        "Lion": LionArguments,
        "Muon": MuonArguments,
        "OneBitAdam": OnebitAdamArguments,
        "OneBitLamb": OnebitLambArguments,
        "ZeroOneAdam": ZeroOneAdamArguments,
        "MuAdam": MuAdamArguments,
        "MuAdamW": MuAdamWArguments,
        "MuSGD": MuSgdArguments,
    },
    "scheduler": {
        "WarmupLR": WarmupLRArguments,
        "WarmupDecayLR": WarmupDecayLRArguments,
        "WarmupCosineLR": WarmupCosineLRArguments,
        "OneCycle": OneCycleArguments,
        "LRRangeTest": LRRangeTestArguments,
    },
}
"""Section -> type, as people write it -> its arguments. All other types are torch's or a plugin's: their builder
checks."""
_ANY_CASE = {section: {name.lower(): model for name, model in models.items()} for section, models in ARGUMENTS.items()}


def arguments_of(section_name: str, type_name: str) -> type[Section] | None:
    """Return the class of the arguments of ``type_name``, None for a type that is checked when it is built.

    Args:
        section_name: ``"optimizer"`` or ``"scheduler"``.
        type_name: the section's ``type``, in any case.

    >>> arguments_of("optimizer", "AdamW") is arguments_of("optimizer", "Adam")
    True
    """
    return _ANY_CASE[section_name].get(type_name.lower())


IGNORES_UNKNOWN = {("optimizer", "muon")}
"""Types whose constructor in DeepSpeed ignores arguments it does not know; all others raise."""
ELSEWHERE = {("optimizer", "max_grad_norm")}
"""Arguments that a rule of their own refuses."""


def argument_problems(section_name: str, type_name: str, params: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with the ``params`` of a section; ``"auto"`` is left to whoever needs the value.

    >>> [problem.path for problem in argument_problems("optimizer", "Adam", {"lr": "auto", "beta": [0.9, 0.99]})]
    ['optimizer.params.beta']
    """
    model = arguments_of(section_name, type_name)
    if model is None:
        return []
    given = {
        name: value for name, value in params.items() if not is_open(value) and (section_name, name) not in ELSEWHERE
    }
    is_ignorable = (section_name, type_name.lower()) in IGNORES_UNKNOWN
    _, problems = validate(model, given, path=(section_name, "params"), unknown_is_ignorable=is_ignorable)
    # A required key that is "auto" is not missing.
    left_open = params.keys() - given.keys()
    return [problem for problem in problems if left_open.isdisjoint(problem.keys[2:3])]
