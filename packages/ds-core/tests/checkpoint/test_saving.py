"""What engines share that write one folder from several ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ds_core.checkpoint.saving import (
    agree_on_id,
    chunk_key,
    file_name,
    gather,
    is_ours,
    place_in,
    remove_leftovers,
    together,
    written_by,
)
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Box, Chunk, LogicalTensor, Piece


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    ids = "0" * 12, "f" * 12
    names = [file_name(0, ids[0]), file_name(0, ids[1]), file_name(1, ids[1], 3), file_name(2, ids[0]) + ".tmp"]
    others = ["checkpoint.json", "notes.safetensors", "rank_00000.safetensors", f"my_{names[0]}"]
    for name in names + others:
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path, keep=[names[1]])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names[1], *others])


def test_files_of_deepspeed_stay_and_are_told(tmp_path, caplog):
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "notes.txt"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, keep=[])
    assert len(list(tmp_path.iterdir())) == 3
    (record,) = caplog.records
    assert "2 files that DeepSpeed wrote are left beside" in record.getMessage()
    assert "'mp_rank_00_model_states.pt'" in record.getMessage()


def test_a_name_that_leads_into_a_folder_is_not_ours():
    name = file_name(0, "0" * 12, suffix="pt")
    assert is_ours(name)
    assert is_ours(f"{name}.metadata")
    assert not is_ours(f"{name}/../../outside")


def test_each_chunk_is_written_once_by_its_writer():
    of, none = LogicalTensor("w", "weight", (4,), "float32"), LogicalTensor("e", "weight", (0, 3), "float32")
    box = Chunk.whole((4,)).box
    first, second, empty = Chunk(box, 0, 2), Chunk(box, 2, 2), Chunk(box, 4, 0)
    pieces = [Piece(of, chunk, torch.zeros(chunk.length), writer) for chunk, writer in ((first, 0), (second, 1))]
    pieces += [Piece(of, empty, torch.zeros(0), 0), Piece(none, Chunk.whole((0, 3)), torch.zeros(0, 3), 0)]
    assert [piece.chunk for piece in written_by(1, pieces)] == [second]
    twice = written_by(0, [*pieces, *pieces])
    assert [(piece.of, piece.chunk) for piece in twice] == [(of, first), (none, Chunk.whole((0, 3)))]
    assert twice[0] is pieces[0]


def test_one_process_gathers_from_itself():
    assert gather({"rank": 0}, None) == [{"rank": 0}]


def test_every_save_has_an_id_of_its_own():
    found = {agree_on_id(None) for _ in range(20)}
    assert len(found) == 20
    assert place_in(None) == (0, 1)


def test_keys_differ_where_chunks_do():
    plain, partial = LogicalTensor("w", "weight", (4, 2), "float32"), LogicalTensor("w", "gradient", (4, 2), "f", 3)
    box = Box((2, 0), (2, 2))
    chunks = [Chunk.whole((4, 2)), Chunk(Box((0, 0), (4, 2)), 3, 2), Chunk(box, 0, 4), Chunk(box, 1, 2)]
    keys = [chunk_key(of, chunk) for of in (plain, partial) for chunk in chunks]
    assert keys[0] == "weight:w"
    assert len(set(keys)) == len(keys)


def test_whatever_fails_is_told_as_an_error_of_checkpoints(tmp_path):
    def full():
        raise OSError(28, "No space left on device", "file")

    with pytest.raises(CheckpointError, match="No space left") as caught:
        together(full, tmp_path, None)
    assert caught.value.where == "file"
    with pytest.raises(CheckpointError, match="ZeroDivisionError") as caught:
        together(lambda: 1 // 0, tmp_path, None)
    assert caught.value.where == str(tmp_path)


def test_folders_are_read_without_torch():
    code = "import sys, ds_core.checkpoint.folder, ds_core.checkpoint.atomic; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
