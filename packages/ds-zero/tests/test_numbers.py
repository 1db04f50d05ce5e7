"""P03 at stages 1 and 2 in fp32: every loss, gradient and weight against plain PyTorch; needs no other package.

Other precisions, parameters of mixed dtypes and stage 0 are factors of tests/test_right_numbers.py of the repository.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from ds_core.testing.low_precision import unnoticed, wrong_cases
from ds_core.testing.matrix import full, pairwise
from ds_core.testing.ranks import run_ranks
from ds_core.testing.reference import MODELS, OUTPUTS, Case

STAGES = (1, 2)
WORLD_SIZES = (1, 2, 3)
FACTORS: dict[str, tuple[Any, ...]] = {
    "place": tuple((stage, world_size) for world_size in WORLD_SIZES for stage in STAGES),
    "model": MODELS,
    "output": OUTPUTS,
    "accumulation": (1, 2, 4),
    "clipping": (0.0, 0.05),
    "optimizer": ("SGD", "AdamW", "WholeSGD", "WholeAdamW"),
    "backwards": (1, 2),
    "bucket_numel": (None, 50),
    "reduce": (None, "bf16"),
}
MUTATIONS = [(Case("plain", optimizer="SGD", stage=stage), factor) for stage in STAGES for factor in (2.0, 0.0, 0.5)]


def cases_of(rows: list[dict[str, Any]], world_size: int) -> list[Case]:
    """Return those that run on ``world_size`` ranks."""
    found = []
    for row in rows:
        stage, ranks = row.pop("place")
        if ranks == world_size:
            found.append(Case(**row, stage=stage))
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_pair_of_values_equals_plain_pytorch(world_size):
    jobs = [partial(wrong_cases, cases_of(pairwise(FACTORS), world_size))]
    if world_size == 2:
        # The mutation check of P03: a comparison that accepts these shows nothing.
        jobs.append(partial(unnoticed, MUTATIONS))
    for found in run_ranks(jobs, world_size, timeout_s=120):
        assert found == [{}] * world_size


@pytest.mark.slow
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [*WORLD_SIZES, 4])
def test_every_case(world_size, stage):
    cases = cases_of(full({**FACTORS, "place": ((stage, world_size),), "output": ("dataclass",)}), world_size)
    [found] = run_ranks([partial(wrong_cases, cases)], world_size, timeout_s=3600)
    assert found == [{}] * world_size
