"""The tables that ``ds ckpt`` prints: of any dtype, and no wider than a terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ds_ckpt.diff import Difference, StateDifference, TensorDifference
from ds_ckpt.storage import folder_at
from ds_ckpt.stored import Stored, StoredChunk, StoredTensor
from ds_ckpt.tables import difference_tables, module_table, summary
from ds_core.checkpoint.safetensors_format import ITEM_BYTES
from ds_core.interfaces.logical import Chunk, LogicalTensor


def printed(*tables: object) -> list[str]:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    for table in tables:
        console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in text.splitlines())
    return text.splitlines()


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_modules_of_any_dtype(dtype: str) -> None:
    of = LogicalTensor("a.b", "buffer", (1024,), dtype)
    chunk = StoredChunk(Chunk.whole((1024,)), "f", 0, 1024 * ITEM_BYTES[dtype])
    stored = Stored(
        folder_at(Path()), "deepspeed", "0.19", 1, {("a.b", "buffer", None): StoredTensor(of, (chunk,))}, {}, {}
    )
    row = next(line.split() for line in printed(module_table(stored)) if line.startswith("a "))
    assert row == ["a", "1.0K", f"{ITEM_BYTES[dtype]}.0KiB", f"{ITEM_BYTES[dtype]}.0KiB"]


OF = LogicalTensor("model.layers.0.attention.query_key_value.weight", "weight", (96, 1000), "float32")
TENSORS = (
    TensorDifference(OF, None),
    TensorDifference(None, replace(OF, kind="exp_avg_sq")),
    TensorDifference(OF, replace(OF, shape=(1000, 96))),
    TensorDifference(OF, replace(OF, kind="master", dtype="bfloat16")),
    TensorDifference(OF, OF, 12_345, 1.5e-7, float("inf")),
    TensorDifference(replace(OF, kind="gradient", rank=3), replace(OF, kind="gradient", rank=3), 1, 2.0, 0.25),
)
STATE = (
    StateDifference("optimizer.groups[0].options.lr", "0.001", "0.002"),
    StateDifference("client_state." + "deep." * 20 + "key", "'" + "x" * 200 + "'", None),
)


def test_differences() -> None:
    found = Difference(TENSORS, STATE, 4, 2**20, 0)
    text = " ".join(" ".join(printed(*difference_tables(found))).split())
    for word in ("only in A", "only in B", "weight/master", "1.5e-07", "inf", "gradient 3", "1 of 96.0K", "(none)"):
        assert word in text
    assert summary(found) == "different: 4 of 4 tensors, 1.0 MiB; 2 tensors in one alone; 2 keys of the state"
    assert list(difference_tables(Difference((), (), 4, 2**20, 0))) == []


def test_many_differences_are_cut() -> None:
    found = Difference(TENSORS[:1] * 150, STATE[:1] * 101, 0, 0, 0)
    tensors, state = (printed(table) for table in difference_tables(found))
    assert tensors[-1].strip() == "... and 50 more"
    assert state[-1].strip() == "... and 1 more"
    assert not any("more" in line for table in difference_tables(found, most_rows=None) for line in printed(table))


@pytest.mark.parametrize(
    ("unread", "text"),
    [(0, "equal: 1 tensor, 2.0 KiB"), (1024, "equal: 1 tensor, 2.0 KiB, 1.0 KiB of them by checksum")],
)
def test_summary_of_equal_ones(unread: int, text: str) -> None:
    assert summary(Difference((), (), 1, 2048, unread)) == text
