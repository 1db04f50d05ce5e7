import csv

from ds_core.config import CsvMonitorSection
from ds_core.monitor.csv_monitor import CsvMonitor
from ds_core.testing.monitor import MonitorContract


class TestCsvMonitor(MonitorContract):
    def build(self, folder):
        return CsvMonitor(CsvMonitorSection(enabled=True, output_path=str(folder), job_name="job"))

    def read(self, folder):
        for path in folder.rglob("*.csv"):
            with path.open(newline="", encoding="utf-8") as file:
                for step, value in list(csv.reader(file))[1:]:
                    yield path.stem, float(value), int(step)
