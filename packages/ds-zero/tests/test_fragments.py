"""The tensors behind a parameter, where ranks have parts of them (stages 1 and 2)."""

from __future__ import annotations

from functools import partial

import pytest

from ds_core import registry
from ds_core.testing.fragments import PRECISIONS, check_life, check_refusals
from ds_core.testing.ranks import run_ranks

INSTALLED = [name for name in PRECISIONS if name in registry.names("precision")]


def checks(world_size: int) -> list[partial[None]]:
    """Small buckets, so that there are several, and parameters lie on one rank, on all, and on some."""
    cases = [(stage, precision, whole) for stage in (1, 2) for precision in INSTALLED for whole in (False, True)]
    if world_size == 1:
        cases = [(stage, INSTALLED[-stage % len(INSTALLED)], stage == 2) for stage in (1, 2)]
    elif world_size == 3:  # every pair of a stage, a precision and a kind of optimizer
        cases = [case for case in cases if (case[0] + INSTALLED.index(case[1]) + case[2]) % 2]
    found = [(check_life, *case) for case in cases]
    if world_size == 2:
        found += [(check_refusals, *case) for case in cases if case[1] != "bf16"]
    sections = {stage: {"zero_optimization": {"stage": stage, "reduce_bucket_size": 30}} for stage in (1, 2)}
    return [partial(check, sections[stage], precision, whole) for check, stage, precision, whole in found]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_on_ranks(world_size: int) -> None:
    run_ranks(checks(world_size), world_size)
