"""Sections of the monitors; the entry name in ``ds_core.monitor`` is the section's key."""

from __future__ import annotations

from typing import Annotated, Literal

from ds_core.config.section import PositiveInt, Secret, Section

__all__ = ["CometSection", "CsvMonitorSection", "TensorboardSection", "WandbSection"]


class CsvMonitorSection(Section):
    """Writes every event to a CSV file."""

    source = "spec/core.md 2.10"

    enabled: bool = False
    """Write the files."""
    output_path: str = ""
    """Folder of the files; empty is the working directory."""
    job_name: str = "DeepSpeedJobName"
    """Folder inside ``output_path``."""


class TensorboardSection(Section):
    """Writes every event to TensorBoard's event files."""

    source = "spec/core.md 2.10"
    comes_with = "ds-core"

    enabled: bool = False
    """Write the files."""
    output_path: str = ""
    """Folder of the files; empty is the working directory."""
    job_name: str = "DeepSpeedJobName"
    """Folder inside ``output_path``."""


class WandbSection(Section):
    """Sends every event to Weights & Biases."""

    source = "spec/core.md 2.10"
    comes_with = "ds-core"

    enabled: bool = False
    """Send the events."""
    group: str | None = None
    """Group of runs that this one belongs to; null is none."""
    team: str | None = None
    """Team that owns the run, which the service calls its entity; null is the user's default."""
    project: str = "deepspeed"
    """Project that the run belongs to."""


class CometSection(Section):
    """Sends events to Comet; a key that is null is left to Comet's own configuration."""

    source = "spec/core.md 2.10"
    comes_with = "ds-core"

    enabled: bool = False
    """Send the events."""
    samples_log_interval: PositiveInt = 100
    """Samples between two values of one metric that are sent; those between them are left out."""
    project: str | None = None
    """Project that the experiment belongs to."""
    workspace: str | None = None
    """Workspace that holds the project."""
    api_key: Annotated[str | None, Secret()] = None
    """Key of the user's account; better kept in Comet's environment variable than in a file."""
    experiment_name: str | None = None
    """Name that the experiment is shown under."""
    experiment_key: str | None = None
    """Identifier of the experiment, to go on with one that exists."""
    online: bool | None = None
    """Send events while training runs (true), or keep them in files to be sent later (false)."""
    mode: Literal["get", "create", "get_or_create"] | None = None
    """Go on with an experiment that exists, create one, or whichever is possible."""
