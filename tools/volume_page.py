"""The table at the end of docs/volume.md, which is ``ds_zero.volume.table()``; the rest is written by hand.

``python tools/volume_page.py`` tells whether it is; ``--write`` writes it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ds_zero.volume import table

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE = Path(__file__).parents[1] / "docs" / "volume.md"
COMMAND = "nox -s docs -- --write"
BEFORE = "made by `ds_zero.volume.table()`:\n"


def render(page: str) -> str:
    """Return ``page`` with today's table."""
    text, found, _ = page.partition(BEFORE)
    assert found, f"docs/volume.md has lost the line before its table: {BEFORE}"
    return f"{text}{BEFORE}\n{table()}\n"


def main(argv: Sequence[str] | None = None, page: Path = PAGE) -> int:
    """Look at the page, or write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table")
    write = parser.parse_args(argv).write
    old = page.read_text(encoding="utf-8")
    new = render(old)
    if write:
        page.write_text(new, encoding="utf-8")
        return 0
    print(f"{page.name} has today's table" if new == old else f"{page.name} has another table\nrun: {COMMAND}")
    return int(new != old)


if __name__ == "__main__":
    sys.exit(main())
