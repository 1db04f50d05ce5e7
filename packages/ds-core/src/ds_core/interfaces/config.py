"""Seam ``config``: a top-level section of a plugin's own. The entry name is the section's key, the entry its class.

The class derives from ``ds_core.config.Section`` and must import without torch. DeepSpeed's own sections are in
``ds_core.config`` and cannot be replaced. Contract: ``ds_core.testing.config``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_core.config import Section

    SectionClass = type[Section]

__all__ = ["SectionClass"]
