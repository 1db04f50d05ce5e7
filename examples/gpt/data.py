"""The demo's text: the bytes of Python's own standard library, which every machine that can run the demo has."""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

# Left out: what was installed later, tests (some Pythons come without them), and tables that are hardly source.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
ONE_FILE_IN = 16
"""One file in this many is kept for validation."""


def source_files(root: Path | None = None) -> list[Path]:
    """Return the library's ``.py`` files, in an order that depends on their names alone.

    Every rank must see the same list: the sampler deals out window numbers, not windows.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = (path for path in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def is_validation(relative_path: str) -> bool:
    """Say whether a file is held out; by a checksum of its name, so that no other file can move it across."""
    return zlib.crc32(relative_path.encode()) % ONE_FILE_IN == 0


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of ``context`` bytes of the training or validation files, one after the other without overlap.

    The text is kept as one byte per byte (about 10 MB) and widened to the int64 that an embedding wants one window at
    a time.
    """

    def __init__(self, split: str, context: int, root: Path | None = None) -> None:
        root = root or Path(sysconfig.get_path("stdlib"))
        files = [
            path
            for path in source_files(root)
            if is_validation(path.relative_to(root).as_posix()) == (split == "validation")
        ]
        self.context = context
        self.text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.context
        window = self.text[start : start + self.context + 1].long()
        # The target of each byte is the byte after it.
        return window[:-1], window[1:]
