"""SIGKILL at every operation of a save that removes an old checkpoint: what is listed is whole, the rest is swept.

This file is also the script that does it: it imports torch once, and forks for every case.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from ds_ckpt.config import ShardedConfig
from ds_ckpt.sharded import ShardedCheckpoint
from ds_ckpt.tags import find_tags
from ds_ckpt.verify import find_damage
from ds_core.interfaces.logical import Chunk, LogicalTensor, Piece, Snapshot
from ds_core.testing import crash

OF = [LogicalTensor(name, "weight", (4,), "float32") for name in ("a", "b")]


def test_a_removal_killed_at_any_point_leaves_whole_checkpoints_and_what_is_swept(tmp_path):
    cases = crash.run_script(__file__, tmp_path)
    assert {case["operation"] for case in cases} >= {"create", "sync", "rename", "remove", "rmdir"}
    # How many complete ones were there: the old two, then the new one as well, then without the oldest.
    counts = [case["loaded"] for case in cases]
    assert counts == sorted(counts[: counts.index(3)]) + [3] * counts.count(3) + [2] * (
        len(counts) - counts.index(3) - counts.count(3)
    )
    assert counts[0] == counts[-1] == 2
    removals = [case["operation"] for case in cases[counts.index(3) :]]
    assert removals.count("remove") == 3, "the manifest and two files"


# -- the script -------------------------------------------------------------------------------------------------------


def save(folder: Path, step: int, **options: int) -> None:
    pieces = [Piece(of, Chunk.whole((4,)), torch.full((4,), float(step))) for of in OF]
    given = Snapshot(pieces, {"global_steps": step}, {})
    ShardedCheckpoint(ShardedConfig(writers=2, chunk_bytes=16, **options), None).save(
        folder, f"step{step}", given, latest=True
    )


def killed(folder: Path, rank: int, store: Path, name: str) -> None:
    crash.ready()
    save(folder, 3, keep_last=2)


def check(folder: Path, name: str) -> int:
    """Count the checkpoints that are complete, having read all of them; then see that the rest is swept."""
    complete = [tag for tag in find_tags(folder) if tag.problem is None]
    for tag in complete:
        assert tag.stored is not None
        assert list(find_damage(tag.stored, lambda nbytes: None)) == []
        assert tag.stored.state["global_steps"] == int(tag.name.removeprefix("step"))
    assert any(tag.is_latest for tag in complete)
    assert {tag.name for tag in complete} >= {"step2"}
    torn = [tag.name for tag in find_tags(folder) if tag.problem is not None]
    for tag in torn:
        for path in (*(folder / tag).iterdir(), folder / tag):
            os.utime(path, (path.stat().st_mtime - 7200,) * 2)
    save(folder, 4, keep_last=2)
    before = "step3" if any(tag.name == "step3" for tag in complete) else "step2"
    assert [tag.name for tag in find_tags(folder)] == [before, "step4"]
    # A folder that lost its last file, or has not got its first, may be anybody's: it stays, and holds nothing.
    assert all(list(path.iterdir()) == [] for path in folder.iterdir() if path.is_dir() and path.name in torn)
    return len(complete)


def main(root: Path) -> None:
    before = root / "before"
    before.mkdir()
    for step in (1, 2):
        save(before, step)
    everything = ("create", "sync", "rename", "remove", "mkdir", "rmdir")
    print(crash.as_json(crash.kill_everywhere(root, before, 1, ["keep"], killed, check, only=everything)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
