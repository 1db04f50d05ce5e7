"""Section ``amp``: mixed precision of NVIDIA's Apex."""

from __future__ import annotations

from pydantic import ConfigDict

from ds_core.config.section import Section

__all__ = ["AmpSection"]


class AmpSection(Section):
    """Apex's mixed precision; every key but ``enabled`` is an argument of ``apex.amp.initialize``."""

    model_config = ConfigDict(extra="allow")

    source = "spec/core.md 2.7, spec/fp16.md"
    comes_with = "ds-core"

    enabled: bool = False
    """Train with Apex."""

    def is_on(self) -> bool:
        """Return whether Apex is asked for: ``enabled`` is true, or it is left out and there are arguments."""
        return self.enabled or ("enabled" not in self.model_fields_set and bool(self.__pydantic_extra__))
