"""Stages 1 and 2 keep what every partition promises."""

from __future__ import annotations

import pytest

from ds_core.testing.partition import PartitionContract
from ds_zero.partition import ZeroStage1, ZeroStage2


class TestStage1(PartitionContract):
    @pytest.fixture
    def partition_class(self) -> type[ZeroStage1]:
        return ZeroStage1


class TestStage2(PartitionContract):
    @pytest.fixture
    def partition_class(self) -> type[ZeroStage2]:
        return ZeroStage2
