"""What the plugins were asked to do, in order; the test reads it."""

from __future__ import annotations

entries: list[str] = []
