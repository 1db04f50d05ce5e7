"""Rules across keys and sections: each returns its problems for a configuration whose sections are valid by themselves.

A rule runs only when nothing that it reads has a problem of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from ds_core.config.choice_rules import CHOICE_RULES
from ds_core.config.paths import open_paths
from ds_core.config.precision_rules import PRECISION_RULES
from ds_core.config.problems import Problem
from ds_core.config.section import show

if TYPE_CHECKING:
    from ds_core.config.config import Config
    from ds_core.config.paths import Path
    from ds_core.config.sections.optimizer import OptimizerSection, SchedulerSection

__all__ = ["check", "unresolved"]

Rule = Callable[["Config"], Iterator[Problem]]


def check(config: Config, bad: Iterable[Path]) -> list[Problem]:
    """Return the problems of ``config`` that show only when several keys are seen together.

    Args:
        config: the configuration, with defaults in place of what is bad.
        bad: keys that have a problem of their own; rules that read them are left out.
    """
    paths = {tuple(map(str, keys)) for keys in bad}

    def is_bad(key: str) -> bool:
        read = tuple(key.split("."))
        return any(path[: len(read)] == read or read[: len(path)] == path for path in paths)

    return [problem for reads, rule in RULES if not any(map(is_bad, reads)) for problem in rule(config)]


def unresolved(config: Config) -> Iterator[Problem]:
    """Return where ``"auto"`` was left in the optimizer and the scheduler, which have no default here."""
    for name in ("optimizer", "scheduler"):
        section = getattr(config, name)
        given = {"type": section.type, "params": section.params} if section else {}
        for path in open_paths(given):
            yield Problem((name, *path), '"auto" was not replaced by a value', "give a value, or remove the key")


def _own_partition(config: Config) -> Iterator[Problem]:
    if config.partition.type is not None and config.zero_optimization.stage > 0:
        yield Problem(
            ("partition", "type"),
            f"got {show(config.partition.type)}, which takes the place of ZeRO, and zero_optimization.stage is "
            f"{config.zero_optimization.stage}",
            'remove "type" from "partition", or set "stage" to 0',
        )


def _offload_at_stage(config: Config) -> Iterator[Problem]:
    zero = config.zero_optimization
    for name, section, stages in (
        ("offload_optimizer", zero.offload_optimizer, (1, 2, 3)),
        ("offload_param", zero.offload_param, (3,)),
    ):
        if section is None or section.device == "none" or zero.stage in stages:
            continue
        needs = "stage 3" if stages == (3,) else "stage 1, 2 or 3"
        yield Problem(
            ("zero_optimization", name),
            f"device is {show(section.device)}, which needs ZeRO {needs}, and zero_optimization.stage is {zero.stage}",
            f'set "stage" to {stages[0]}, or remove it',
            # DeepSpeed ignores it.
            ignorable=True,
        )


def _files_need_a_folder(config: Config) -> Iterator[Problem]:
    zero = config.zero_optimization
    for name, section in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_param)):
        if section is not None and section.device == "nvme" and not section.nvme_path and zero.stage > 0:
            yield Problem(
                ("zero_optimization", name, "nvme_path"),
                'is missing, and device is "nvme"',
                'add "nvme_path", a folder on a fast disk of every node',
            )


def _auto_needs_a_budget(config: Config) -> Iterator[Problem]:
    section = config.sections.get("activation_checkpointing")
    if getattr(section, "policy", None) == "auto" and getattr(section, "memory_budget", None) is None:
        yield Problem(
            ("activation_checkpointing", "memory_budget"),
            'is missing, and policy is "auto"',
            'add "memory_budget", the bytes that saved activations may take, or take another policy',
        )


def _offload_ratio(config: Config) -> Iterator[Problem]:
    offload = config.zero_optimization.offload_optimizer
    if offload is not None and offload.ratio < 1 and config.zero_optimization.stage != 3:
        yield Problem(
            ("zero_optimization", "offload_optimizer", "ratio"),
            f"got {offload.ratio}, below 1 is possible at stage 3 only, not at stage {config.zero_optimization.stage}",
            'set "ratio" to 1, or "stage" to 3',
        )


ONE_BIT = ("onebitadam", "onebitlamb", "zerooneadam")


def _no_zero_with_one_bit(config: Config) -> Iterator[Problem]:
    if config.optimizer is not None and config.optimizer.type.lower() in ONE_BIT and config.zero_optimization.stage > 0:
        yield Problem(
            ("optimizer", "type"),
            f"got {show(config.optimizer.type)}, which compresses whole gradients, and zero_optimization.stage is "
            f"{config.zero_optimization.stage}",
            'set "stage" to 0, or take another optimizer',
        )


def _arguments(section_name: str) -> Rule:
    def rule(config: Config) -> Iterator[Problem]:
        section: OptimizerSection | SchedulerSection | None = getattr(config, section_name)
        if section is not None:
            from ds_core.config.sections.arguments import argument_problems  # as many classes as all others together

            yield from argument_problems(section_name, section.type, section.params)

    return rule


def _no_max_grad_norm(config: Config) -> Iterator[Problem]:
    if config.optimizer is not None and "max_grad_norm" in config.optimizer.params:
        yield Problem(
            ("optimizer", "params", "max_grad_norm"),
            "is not an argument of the optimizer",
            'write it as "gradient_clipping" at the top level',
        )


_STAGE = "zero_optimization.stage"
_OFFLOAD = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
RULES: list[tuple[set[str], Rule]] = [
    *PRECISION_RULES,
    ({"partition.type", _STAGE}, _own_partition),
    ({_STAGE, *_OFFLOAD}, _offload_at_stage),
    ({_STAGE, *_OFFLOAD}, _files_need_a_folder),
    ({_STAGE, *_OFFLOAD}, _offload_ratio),
    ({"activation_checkpointing"}, _auto_needs_a_budget),
    ({_STAGE, "optimizer.type"}, _no_zero_with_one_bit),
    ({"optimizer.params"}, _no_max_grad_norm),
    ({"optimizer.type", "optimizer.params"}, _arguments("optimizer")),
    ({"scheduler.type", "scheduler.params"}, _arguments("scheduler")),
    *CHOICE_RULES,
]
"""(keys and sections the rule reads, the rule)."""
