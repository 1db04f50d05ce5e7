"""The runnable blocks of the Markdown files: a fence of python or bash with the line ``<!-- run -->`` right above it.

Each block runs alone, in an empty folder. A block that is not marked is prose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MARK", "Block", "blocks"]

MARK = "<!-- run -->"
LANGUAGES = ("python", "bash")
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\s*$")


@dataclass(frozen=True)
class Block:
    """One marked block; ``line`` is that of its first line of code."""

    path: Path
    line: int
    language: str
    code: str

    @property
    def command(self) -> list[str]:
        """The words before the code: ``python -c`` or ``bash -c``; bash stops at the first failure."""
        return ["python", "-c"] if self.language == "python" else ["bash", "-euc"]


def blocks(path: Path) -> list[Block]:
    """Return the marked blocks of ``path``.

    Raises:
        ValueError: a mark is followed by something else than a fence of a language known here.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines):
        if line.strip() != MARK:
            continue
        fence = _FENCE.match(lines[number + 1]) if number + 1 < len(lines) else None
        if fence is None or fence["language"] not in LANGUAGES:
            raise ValueError(f"{path}:{number + 1}: {MARK} needs a fence of {' or '.join(LANGUAGES)} in the next line")
        end = next(
            (at for at in range(number + 2, len(lines)) if lines[at].strip() == "```"),
            len(lines),
        )
        indent = len(fence["indent"])
        code = "\n".join(text[indent:] for text in lines[number + 2 : end])
        found.append(Block(path, number + 3, fence["language"], code + "\n"))
    return found
