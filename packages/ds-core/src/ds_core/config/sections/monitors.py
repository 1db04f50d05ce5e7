"""Sections of the monitors; the entry name in ``ds_core.monitor`` is the section's key."""

from __future__ import annotations

from ds_core.config.section import Section

__all__ = ["CsvMonitorSection"]


class CsvMonitorSection(Section):
    """Writes every event to a CSV file."""

    enabled: bool = False
    """Write the files."""
    output_path: str = ""
    """Folder of the files; empty is the working directory."""
    job_name: str = "DeepSpeedJobName"
    """Folder inside ``output_path``."""
