"""Weights in Hugging Face's layout: one file or shards of a size with an index, whole or absent. Loads no torch.

Note: whole or absent. All files are written and synced in a folder of their own inside the output. Then the old index
goes, so that nothing names old and new shards together; then the new files are renamed into place, the index last. A
kill in between leaves the old export, none, or the new one.

Note: shared weights. A weight with several names is written once, under the first name that the model has it by; the
others are in the file's metadata, alias -> name, as ``safetensors.torch.save_model`` does. ``transformers`` ties them
again by the model's configuration.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ds_core.checkpoint.atomic import make_durable, replace_text, sync_folder
from ds_core.checkpoint.disk_errors import fix_of
from ds_core.errors import CheckpointError
from ds_core.log import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from ds_core.checkpoint.safetensors_format import Entry

__all__ = [
    "STAGING",
    "Exported",
    "Layout",
    "natural",
    "parse_dtype",
    "parse_size",
    "plan_layout",
    "write_layout",
    "writing",
]

STAGING = ".export.tmp"
"""The folder inside the output where files are until all are written; a killed export leaves it to the next one."""
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    folder: Path
    files: tuple[str, ...]
    """Names of the files with tensors, in order."""
    index: str | None
    """Name of the file that says which tensor is where; None where there is one file."""
    tensors: int
    nbytes: int
    """Of all tensors."""
    shared: Mapping[str, str]
    """Alias -> the name its weight is stored under."""
    beyond: tuple[str, ...] = ()
    """Tensors with finite values that the dtype asked for cannot hold: they became infinite."""


@dataclass(frozen=True)
class Layout:
    """Which tensor goes into which file."""

    stem: str
    """``model`` or ``pytorch_model``."""
    suffix: str
    """``.safetensors`` or ``.bin``."""
    files: Mapping[str, tuple[Entry, ...]]
    """Name -> tensors, both in the order they are written in."""
    shared: Mapping[str, str]

    @property
    def index(self) -> str | None:
        return f"{self.stem}{self.suffix}.index.json" if len(self.files) > 1 else None

    @property
    def entries(self) -> list[Entry]:
        """All tensors, in the order they are written in."""
        return [entry for entries in self.files.values() for entry in entries]

    def aliases_in(self, file: str) -> dict[str, str]:
        """Return the aliases of the tensors of ``file``."""
        here = {entry.name for entry in self.files[file]}
        return {alias: name for alias, name in self.shared.items() if name in here}

    def metadata(self, file: str) -> dict[str, str]:
        """Return the strings of a safetensors file's header."""
        return {**self.aliases_in(file), "format": "pt"}

    def exported(self, folder: Path, beyond: Iterable[str] = ()) -> Exported:
        """Return what there is in ``folder`` once this is written."""
        entries = self.entries
        nbytes = sum(entry.nbytes for entry in entries)
        return Exported(folder, tuple(self.files), self.index, len(entries), nbytes, self.shared, tuple(beyond))

    def index_text(self) -> str:
        """Return the content of the index."""
        places = {entry.name: file for file, entries in self.files.items() for entry in entries}
        if self.suffix == ".bin":
            # A safetensors file has no tensor of an alias's name.
            places.update({alias: places[name] for alias, name in self.shared.items()})
        total = sum(entry.nbytes for entry in self.entries)
        return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True) + "\n"

    def is_ours(self, name: str) -> bool:
        """Return whether ``name`` is a file of some export of this kind."""
        stem, suffix = re.escape(self.stem), re.escape(self.suffix)
        return bool(re.fullmatch(rf"{stem}(-\d{{5,}}-of-\d{{5,}})?{suffix}|{stem}{suffix}\.index\.json", name))


def parse_dtype(dtype: object) -> str | None:
    """Return torch's word of what weights are cast to; None: they stay as the model has them.

    >>> parse_dtype("bfloat16"), parse_dtype("FP16"), parse_dtype("torch.float32"), parse_dtype("stored")
    ('bfloat16', 'float16', 'float32', None)

    Args:
        dtype: a word in any case, a ``torch.dtype``, or None.

    Raises:
        CheckpointError: it is none that weights can be cast to.
    """
    given = str(dtype).removeprefix("torch.")
    word = given.strip().lower()
    if word in ("none", "stored"):
        return None
    word = _SHORT_DTYPES.get(word, word)
    if word not in _SHORT_DTYPES.values():
        raise CheckpointError(
            f"weights cannot be exported as {given!r}",
            where="dtype",
            fix=f"one of {', '.join(dict.fromkeys(_SHORT_DTYPES.values()))}, or None for what the model has",
        )
    return word


def parse_size(size: str | int | None, where: str = "max_shard_size") -> int | None:
    """Return a size in bytes; None, or the word, stands for no limit.

    >>> parse_size("5GB"), parse_size("1.5 MB"), parse_size(10**6), parse_size(None)
    (5000000000, 1500000, 1000000, None)
    """
    if size is None or (isinstance(size, str) and size.strip().lower() == "none"):
        return None
    found = None
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B)?\s*", size, re.IGNORECASE)
        if match:
            found = int(float(match[1]) * _UNITS[(match[2] or "B").upper()])
    elif isinstance(size, int) and not isinstance(size, bool):
        found = size
    if found is None or found < 1:
        raise CheckpointError(f"the size of a shard is {size!r}", where=where, fix="such as '5GB', '500MB' or 10**9")
    return found


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts layer 10 after layer 9.

    >>> sorted(["h.10.w", "h.9.w", "h.b"], key=natural)
    ['h.9.w', 'h.10.w', 'h.b']
    """
    # [0-9], since some of what \d matches is no number for int().
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), part) if index % 2 else (1, 0, part) for index, part in enumerate(parts) if part]


def plan_layout(
    entries: Iterable[Entry], shared: Mapping[str, str], *, max_shard_size: str | int | None, safe_serialization: bool
) -> Layout:
    """Return which tensor goes into which file: in the natural order of names, so that equal weights give equal files.

    Args:
        entries: every weight once.
        shared: alias -> name; those of names that are not among ``entries`` are left out.
        max_shard_size: of the tensors of a file, such as ``"5GB"``; a larger tensor has a file of its own. None: one
            file.
        safe_serialization: ``model.safetensors`` rather than ``pytorch_model.bin``.
    """
    limit = parse_size(max_shard_size)
    ordered = sorted(entries, key=lambda entry: (natural(entry.name), entry.name))
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in ordered:
        if limit is not None and shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    stem, suffix = ("model", ".safetensors") if safe_serialization else ("pytorch_model", ".bin")
    count = len(shards)
    # Wide dtypes first: then every tensor starts at a multiple of its item size.
    files = {
        f"{stem}{'' if count == 1 else f'-{number:05d}-of-{count:05d}'}{suffix}": tuple(
            sorted(shard, key=lambda entry: -entry.item_bytes)
        )
        for number, shard in enumerate(shards, 1)
    }
    names = {entry.name for entry in ordered}
    aliases = {
        alias: shared[alias]
        for alias in sorted(shared, key=lambda alias: (natural(alias), alias))
        if shared[alias] in names and alias not in names
    }
    return Layout(stem, suffix, files, aliases)


def write_layout(folder: Path, layout: Layout, write_file: Callable[[Path, str], Any]) -> None:
    """Write the files of ``layout`` into ``folder``, which is made if missing; durable on return.

    Args:
        folder: what another export of the same kind left there is replaced; other files stay.
        layout: of :func:`plan_layout`.
        write_file: ``write_file(path, name)`` writes the file ``name`` of the layout to ``path``.

    Raises:
        CheckpointError: the disk is full, ...; what was there is still whole, unless renaming failed.
    """
    with writing(folder):
        make_durable(folder)
        _check_not_hidden(folder, layout)
        staging = folder / STAGING
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir()
        try:
            for name in layout.files:
                write_file(staging / name, name)
            if layout.index is not None:
                replace_text(staging / layout.index, layout.index_text())
            _publish(folder, staging, layout)
        finally:
            # Whether all is in place by now or something failed: that this fails, too, must not be what is told.
            shutil.rmtree(staging, ignore_errors=True)
            if staging.exists():
                logger.warning("a folder of temporary files cannot be removed: %s", staging)


def _check_not_hidden(folder: Path, layout: Layout) -> None:
    hiding = [folder / name for name in ("model.safetensors", "model.safetensors.index.json")]
    found = [path.name for path in hiding if path.exists()]
    if found and layout.suffix != ".safetensors":
        raise CheckpointError(
            f"{found[0]} is in the folder, which is loaded in place of a .bin file",
            where=str(folder),
            fix="remove it, or choose another folder",
        )


def _publish(folder: Path, staging: Path, layout: Layout) -> None:
    new: list[str] = [*layout.files, *([layout.index] if layout.index is not None else [])]
    old = sorted(path.name for path in folder.iterdir() if layout.is_ours(path.name))
    # Who is loaded by name, without an index, may be replaced in one step, but not stay beside a new index.
    whole, index = layout.stem + layout.suffix, f"{layout.stem}{layout.suffix}.index.json"
    for name in (index, whole):
        if name in old and (name == index or name not in new):
            (folder / name).unlink()
    sync_folder(folder)
    for name in new:
        if name == layout.index:
            sync_folder(folder)
        (staging / name).replace(folder / name)
    sync_folder(folder)
    for name in old:
        if name not in new:
            (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the system says while weights are written into ``folder`` into an error that says where and what."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the weights cannot be written: {error.strerror or error}",
            where=str(error.filename or folder),
            fix=fix_of(error),
        ) from error
