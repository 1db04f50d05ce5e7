"""What ``ds ckpt`` prints, as tables that fit into 80 columns. Loads no torch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from ds_core.checkpoint.safetensors_format import ITEM_BYTES
from ds_core.interfaces.logical import BUFFER, GRADIENT, MASTER, WEIGHT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ds_ckpt.diff import Difference, StateDifference, TensorDifference
    from ds_ckpt.stored import Stored
    from ds_ckpt.tags import Tag

__all__ = [
    "difference_tables",
    "facts",
    "least_width",
    "module_table",
    "one_line",
    "size_in_words",
    "summary",
    "tag_table",
]

_MOST_ROWS = 100
_LEAST_WIDTH = 12
"""Of a column whose text is folded."""
_COLUMNS = {WEIGHT: "weights", MASTER: "masters", BUFFER: "buffers", GRADIENT: "gradients"}
_OPTIMIZER = "optimizer"


def size_in_words(nbytes: int) -> str:
    """Return a number of bytes in at most 9 characters.

    >>> size_in_words(0), size_in_words(1023), size_in_words(1536), size_in_words(3 * 2**40)
    ('0 B', '1023 B', '1.5 KiB', '3.0 TiB')
    """
    amount, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{nbytes} B" if unit == "B" else f"{amount:.1f} {unit}" if amount < 1000 else f"{amount:.0f} {unit}"


def _short(number: int) -> str:
    """Return a number of elements in at most 6 characters, by thousands.

    >>> _short(256), _short(64_000), _short(7_241_732_096)
    ('256', '64.0K', '7.2B')
    """
    amount, unit = float(number), ""
    for larger in "KMBTQ":
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.1f}{unit}" if unit else str(number)


def least_width(table: Table) -> int:
    """Return how wide a table is at least; with less room, columns would be cut or left out."""
    widths = []
    for column in table.columns:
        natural = max((cell_len(str(cell)) for cell in (column.header, *column.cells)), default=0)
        widths.append(natural if column.no_wrap else min(natural, column.min_width or _LEAST_WIDTH))
    return sum(widths) + 2 * (len(widths) - 1)


def tag_table(tags: Sequence[Tag]) -> Table:
    """Return a row per checkpoint."""
    table = _table("tag", "step", "size", "ranks", "format")
    for tag in tags:
        name = Text(tag.name + (" (latest)" if tag.is_latest else ""))
        if tag.stored is None:
            table.add_row(name, "", "", "", Text(f"cannot be loaded: {tag.problem}"))
            continue
        stored = tag.stored
        step = stored.state.get("global_steps")
        size = size_in_words(sum(file.nbytes for file in stored.files.values()))
        form = Text(f"{stored.format} {stored.version}")
        table.add_row(name, Text("" if step is None else str(step)), size, str(stored.world_size), form)
    return table


def facts(stored: Stored) -> Iterator[tuple[str, str]]:
    """Yield what there is to say about a checkpoint as a whole."""
    yield "folder", str(stored.folder)
    yield "format", f"{stored.format} {stored.version}"
    yield "written", f"by {stored.world_size} rank{'' if stored.world_size == 1 else 's'}"
    words = [("global_steps", "step"), ("global_samples", "samples"), ("precision", "precision"), ("stage", "stage")]
    known = [f"{word} {stored.state[key]}" for key, word in words if stored.state.get(key) is not None]
    if known:
        yield "state", ", ".join(known)
    dtypes = Counter[str]()
    for tensor in stored.tensors.values():
        dtypes[f"{tensor.of.kind} {tensor.of.dtype}"] += 1
    yield "tensors", ", ".join(f"{count} {what}" for what, count in dtypes.items()) or "none"
    size = sum(file.nbytes for file in stored.files.values())
    yield "files", f"{len(stored.files)}, {size_in_words(size)}"


def one_line(stored: Stored) -> str:
    """Return which checkpoint this is."""
    step = stored.state.get("global_steps")
    parts = [f"{stored.format} {stored.version}", *([] if step is None else [f"step {step}"])]
    return f"{', '.join(parts)}, {_count(stored.world_size, 'rank')}: {stored.folder}"


def module_table(stored: Stored, depth: int | None = None) -> Table:
    """Return a row per module with the bytes of each kind, and a last one with all.

    Args:
        stored: the checkpoint.
        depth: how many parts of a name make a row; None: as many as fit into 100 rows.
    """
    modules = _by_module(stored)
    if depth is None:
        deepest = max((name.count(".") + 1 for name in modules), default=0)
        depth = next((d for d in range(deepest, 1, -1) if len({_cut(name, d) for name in modules}) <= _MOST_ROWS), 1)
    folded: dict[str, Counter[str]] = {}
    for name, sizes in modules.items():
        folded.setdefault(_cut(name, depth), Counter()).update(sizes)
    total = sum(folded.values(), Counter[str]())
    kinds = [
        kind for kind in (WEIGHT, MASTER, _OPTIMIZER, BUFFER, GRADIENT) if any(kind in row for row in folded.values())
    ]
    table = _table("module", "elements", *(_COLUMNS.get(kind, kind) for kind in kinds), "bytes")
    for name, row in folded.items():
        _add(table, name or "(root)", row, kinds)
    table.add_section()
    _add(table, "all", total, kinds)
    return table


def difference_tables(difference: Difference, *, most_rows: int | None = _MOST_ROWS) -> Iterator[Table]:
    """Yield a table of the tensors that differ and one of the keys of the state, those that have rows."""
    if difference.tensors:
        table = _table("tensor", "kind", "differing", "largest", "relative")
        for tensor in difference.tensors[:most_rows]:
            sizes = [f"{number:.2g}" if tensor.count else "" for number in (tensor.largest, tensor.relative)]
            table.add_row(Text(tensor.of.name), Text(_kinds(tensor)), Text(_what_differs(tensor)), *sizes)
        _add_rest(table, len(difference.tensors), most_rows)
        yield table
    if difference.state:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name, width in (("state", 20), ("A", 16), ("B", 16)):
            table.add_column(name, overflow="fold", min_width=width)
        for key in difference.state[:most_rows]:
            table.add_row(*(Text(cell) for cell in _cells(key)))
        _add_rest(table, len(difference.state), most_rows)
        yield table


def _add_rest(table: Table, count: int, most_rows: int | None) -> None:
    if most_rows is not None and count > most_rows:
        table.add_row(Text(f"... and {count - most_rows} more"))


def _cells(key: StateDifference) -> tuple[str, str, str]:
    return key.path, "(none)" if key.a is None else key.a, "(none)" if key.b is None else key.b


def _kinds(tensor: TensorDifference) -> str:
    kinds = dict.fromkeys(of.kind for of in (tensor.a, tensor.b) if of is not None)
    return "/".join(kinds) + ("" if tensor.of.rank is None else f" {tensor.of.rank}")


def _what_differs(tensor: TensorDifference) -> str:
    a, b = tensor.a, tensor.b
    if a is None or b is None:
        return "only in A" if b is None else "only in B"
    if a.shape != b.shape:
        return f"{list(a.shape)} and {list(b.shape)}"
    count = f"{_short(tensor.count)} of {_short(a.numel)}" if tensor.count else "none"
    return count if a.dtype == b.dtype else f"{count}, {a.dtype} and {b.dtype}"


def summary(difference: Difference) -> str:
    """Return in one line whether two checkpoints are equal, and how much was compared."""
    alone = sum(tensor.a is None or tensor.b is None for tensor in difference.tensors)
    unread = f", {size_in_words(difference.unread)} of them by checksum" if difference.unread else ""
    compared = f"{_count(difference.compared, 'tensor')}, {size_in_words(difference.nbytes)}{unread}"
    if difference.is_empty:
        return f"equal: {compared}"
    parts = [f"{len(difference.tensors) - alone} of {compared}"]
    parts += [f"{_count(alone, 'tensor')} in one alone"] * bool(alone)
    parts += [_count(len(difference.state), "key") + " of the state"] * bool(difference.state)
    return f"different: {'; '.join(parts)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _add(table: Table, name: str, row: Counter[str], kinds: Sequence[str]) -> None:
    # Without a space: the names of modules need the room.
    sizes = [size_in_words(row[kind]).replace(" ", "") if row[kind] else "" for kind in kinds]
    total = size_in_words(sum(row[kind] for kind in kinds)).replace(" ", "")
    table.add_row(Text(name), _short(row["elements"]), *sizes, total)


def _by_module(stored: Stored) -> dict[str, Counter[str]]:
    """Return module -> kind -> bytes; ``elements`` counts parameters and buffers."""
    found: dict[str, Counter[str]] = {}
    counted: set[str] = set()
    for tensor in stored.tensors.values():
        of = tensor.of
        row = found.setdefault(of.name.rpartition(".")[0], Counter())
        row[of.kind if of.kind in _COLUMNS else _OPTIMIZER] += of.numel * ITEM_BYTES[of.dtype]
        if of.kind in (WEIGHT, MASTER, BUFFER) and of.name not in counted:
            counted.add(of.name)
            row["elements"] += of.numel
    return found


def _cut(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, overflow="fold", min_width=_LEAST_WIDTH)
    for name in others:
        is_text = name in ("format", "kind", "differing")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    return table
