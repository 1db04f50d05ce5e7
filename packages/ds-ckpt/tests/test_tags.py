"""Which checkpoint ``checkpoint.load_universal`` means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ds_ckpt.background import AsyncCheckpoint
from ds_ckpt.sharded import ShardedCheckpoint
from ds_ckpt.tags import latest_universal
from ds_core.errors import CheckpointError, NoCheckpointError
from ds_core.interfaces.logical import Snapshot

if TYPE_CHECKING:
    from pathlib import Path

MISSING = "there is no file 'latest_universal' that names the checkpoint to load"


def test_the_converter_s_file_comes_first(tmp_path: Path) -> None:
    ShardedCheckpoint(None, None).save(tmp_path, "ours", Snapshot([], {}, {}), latest=True)
    assert latest_universal(tmp_path) == "ours"
    (tmp_path / "latest_universal").write_text("step_universal\n")
    assert latest_universal(tmp_path) == "step_universal"
    for engine in (ShardedCheckpoint, AsyncCheckpoint):
        assert engine.reads_universal
        assert engine(None, None).read_latest_universal(tmp_path) == "step_universal"


def test_what_deepspeed_wrote_as_usual_is_loaded_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "step5").mkdir()
    (tmp_path / "step5" / "mp_rank_00_model_states.pt").touch()
    (tmp_path / "latest").write_text("step5")
    assert latest_universal(tmp_path) == "step5"
    (record,) = caplog.records
    assert "what 'latest' names is loaded: 'step5'" in record.getMessage()


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError) as caught:
        latest_universal(tmp_path)
    assert (caught.value.what, caught.value.where) == (f"{MISSING}, and no 'latest'", str(tmp_path))
    with pytest.raises(NoCheckpointError, match="does not exist"):
        latest_universal(tmp_path / "nowhere")
    (tmp_path / "step5").mkdir()
    (tmp_path / "step5" / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(CheckpointError) as found:
        latest_universal(tmp_path)
    assert not isinstance(found.value, NoCheckpointError)
    assert "step5" in (found.value.fix or "")


def test_a_name_that_leads_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "latest_universal").write_text("../other")
    with pytest.raises(CheckpointError, match="cannot name a checkpoint"):
        latest_universal(tmp_path)
