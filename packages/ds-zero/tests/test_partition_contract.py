"""Stages 1 and 2 keep what every partition promises, in buckets of every size, and with whole tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ds_core.testing.partition import PartitionContract
from ds_zero.partition import ZeroStage1, ZeroStage2

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ds_core.interfaces.partition import Partition

SIZES = (1, 20, 10**6)
"""Elements per bucket: one parameter each, some, all."""


@pytest.mark.parametrize("stage", [1, 2])
class TestStages(PartitionContract):
    @pytest.fixture
    def partition_class(self, stage: int) -> type[Partition]:
        return ZeroStage1 if stage == 1 else ZeroStage2

    @pytest.fixture
    def variants(self, stage: int) -> list[tuple[Mapping[str, Any], bool]]:
        return [
            ({"zero_optimization": {"stage": stage, "reduce_bucket_size": size}}, whole_tensors)
            for size in SIZES
            for whole_tensors in (False, True)
        ]
