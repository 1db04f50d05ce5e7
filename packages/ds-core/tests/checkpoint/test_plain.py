"""What ``plain`` says of checkpoints that others wrote; what it writes and reads is in ``test_plain_contract``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ds_core import registry
from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

SHARDED = 'set checkpoint.engine to "sharded", or leave it out'


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("checkpoint.json", '{"format": "ds-sharded", "version": 1}', "this checkpoint has format 'ds-sharded'"),
        ("mp_rank_00_model_states.pt", "", "this checkpoint was written by DeepSpeed"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "", "this checkpoint was written by DeepSpeed"),
        ("zero/optimizer_state.pt", "", "this checkpoint was written by DeepSpeed"),
    ],
)
@pytest.mark.parametrize(("names", "fix"), [(("plain",), "pip install ds-ckpt"), (("plain", "sharded"), SHARDED)])
def test_what_ds_ckpt_reads_is_named(
    file: str,
    content: str,
    what: str,
    names: tuple[str, ...],
    fix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "names", lambda seam: names)
    path = tmp_path / "tag" / file
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        PlainCheckpoint(None, None).open(tmp_path, "tag")
    assert caught.value.what == f"{what}, which the engine 'plain' does not read; 'sharded' of ds-ckpt does"
    assert (caught.value.where or "").startswith(str(tmp_path / "tag"))
    assert caught.value.fix == fix


def test_a_format_nobody_knows_is_its_engine_s(tmp_path: Path) -> None:
    (tmp_path / "tag").mkdir()
    (tmp_path / "tag" / "checkpoint.json").write_text('{"format": "tapes"}')
    with pytest.raises(CheckpointError, match="has format 'tapes'") as caught:
        PlainCheckpoint(None, None).open(tmp_path, "tag")
    assert caught.value.fix == "set checkpoint.engine to the engine that wrote it"
