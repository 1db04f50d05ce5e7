"""A top-level section of our own."""

from __future__ import annotations

from ds_core.config import PositiveInt, Section


class AcmeSection(Section):
    """``{"acme": {"anvils": 2}}``."""

    anvils: PositiveInt = 1
    """How many there are."""
