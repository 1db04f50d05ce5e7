"""Which format a folder has."""

from __future__ import annotations

import pytest

from ds_ckpt import formats
from ds_ckpt.sharded import ShardedCheckpoint
from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.errors import CheckpointError
from ds_core.testing.checkpoint import snapshot


def test_each_is_recognised(tmp_path):
    ShardedCheckpoint(None, None).save(tmp_path, "a", snapshot(1), latest=False)
    PlainCheckpoint(None, None).save(tmp_path, "b", snapshot(1), latest=False)
    assert [formats.read(tmp_path / tag).format for tag in "ab"] == ["ds-sharded", "ds-plain"]


def test_none_at_all_names_the_complete_ones(tmp_path):
    ShardedCheckpoint(None, None).save(tmp_path, "whole", snapshot(1), latest=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for tag in ("empty", "nowhere", "file"):
        with pytest.raises(CheckpointError, match=tag) as caught:
            formats.read(tmp_path / tag)
        assert "whole" in caught.value.fix
        assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", "1", "null", '{"format": "other"}', "", "not json"])
def test_a_manifest_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "tag").mkdir()
    (tmp_path / "tag" / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        formats.read(tmp_path / "tag")
    assert caught.value.where.endswith("checkpoint.json")


def test_a_manifest_that_is_a_link_is_refused(tmp_path):
    ShardedCheckpoint(None, None).save(tmp_path, "whole", snapshot(1), latest=False)
    (tmp_path / "tag").mkdir()
    (tmp_path / "tag" / "checkpoint.json").symlink_to("../whole/checkpoint.json")
    with pytest.raises(CheckpointError, match="link"):
        formats.read(tmp_path / "tag")
