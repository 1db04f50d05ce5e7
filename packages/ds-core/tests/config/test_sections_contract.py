"""The contract of a plugin's own section, held against sections of the core's own."""

import pytest

from ds_core.config import CsvMonitorSection, OptimizerSection
from ds_core.testing.config import SectionContract


class TestCsvMonitorSection(SectionContract):
    @pytest.fixture
    def section_class(self):
        return CsvMonitorSection


class TestOptimizerSection(SectionContract):
    @pytest.fixture
    def section_class(self):
        return OptimizerSection

    @pytest.fixture
    def valid(self):
        return {"type": "AdamW", "params": {"lr": 0.01}}
