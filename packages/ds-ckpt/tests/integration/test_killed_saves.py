"""SIGKILL at every write, sync, rename, removal and folder of a save, on either rank: old or new, but whole (P11).

Here the engine saves a snapshot, on one and on two ranks, in several files each, over the same tag and beside it.
This file is also the script that does it: it imports torch once, and forks for every process of every case.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ds_ckpt.config import ShardedConfig
from ds_ckpt.formats import read
from ds_ckpt.sharded import ShardedCheckpoint
from ds_core.interfaces.logical import Box, Chunk, LogicalTensor, Piece, Snapshot

TIMEOUT_S = 20.0


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_save_killed_at_any_point_leaves_a_whole_checkpoint(world_size, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(world_size)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    cases = json.loads(done.stdout.splitlines()[-1])
    for tag in ("same", "new"):
        for killed_rank in range(world_size):
            found = [case for case in cases if (case["tag"], case["rank"]) == (tag, killed_rank)]
            seen = {case["operation"] for case in found}
            # Rank 0 goes on with the manifest, ``latest`` and the leftovers.
            expected = {"write", "fsync", "create"}
            if killed_rank == 0:
                expected |= {"rename"} | ({"unlink"} if tag == "same" else {"mkdir"} if world_size == 1 else set())
            assert expected <= seen, f"{tag}, rank {killed_rank}: {seen}"
            loaded = [case["loaded"] for case in found]
            assert loaded == sorted(loaded), "once it is the new one it stays the new one"
            assert loaded[0] == 1
            assert loaded[-1] == (2 if killed_rank == 0 else 1)


# -- the script -------------------------------------------------------------------------------------------------------


def snapshot(version: int, rank: int, world_size: int) -> Snapshot:
    """Return what a rank saves: a whole tensor, a shard of one, an empty one. Every element tells the version."""
    whole = LogicalTensor("whole", "weight", (4, 3), "float32")
    cut = LogicalTensor("cut", "master", (2 * world_size, 5), "float64")
    empty = LogicalTensor("empty", "weight", (0, 2), "float32")
    box = Box((0, 0), cut.shape)
    pieces = [
        Piece(whole, Chunk.whole(whole.shape), torch.full(whole.shape, float(version))),
        Piece(cut, Chunk(box, 10 * rank, 10), torch.full((10,), float(version), dtype=torch.float64), rank),
        Piece(empty, Chunk.whole(empty.shape), torch.zeros(empty.shape), world_size - 1),
    ]
    return Snapshot(pieces, {"version": version}, {"rank": rank, "version": version})


def engine(world_size: int) -> ShardedCheckpoint:
    group = dist.group.WORLD if world_size > 1 else None
    return ShardedCheckpoint(ShardedConfig(writers=2, chunk_bytes=64), group)


def version_of(folder: Path, tag: str) -> int:
    """Return the version of a tag, having checked that all of it is there."""
    with engine(1).open(folder, tag) as reader:
        version = reader.state["version"]
        pieces = []
        for of in reader.tensors():
            pieces.append(Piece(of, Chunk.whole(of.shape), torch.full(of.shape, -1, dtype=getattr(torch, of.dtype))))
        assert sorted(piece.of.name for piece in pieces) == ["cut", "empty", "whole"]
        reader.read(pieces)
        assert all((piece.data == version).all() for piece in pieces), "a mixture"
        assert [reader.rank_state(rank) for rank in range(reader.world_size)] == [
            {"rank": rank, "version": version} for rank in range(reader.world_size)
        ]
    return version


def die_before(point: int, report: Path) -> None:
    """Kill this process before its ``point``-th operation, in whatever thread, and note which it was."""
    lock, seen = threading.Lock(), 0

    def at_a_point(name):
        nonlocal seen
        with lock:
            if seen == point:
                real_write(real_open(report, os.O_WRONLY | os.O_CREAT), name.encode())
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    def counted(name, call, counts=lambda *_args, **_options: True):
        def instead(*args, **kwargs):
            is_one = counts(*args, **kwargs)
            if is_one:
                at_a_point(name)
            found = call(*args, **kwargs)
            if is_one and name == "create":
                at_a_point("write")  # what comes first, also where it is buffered: the file is there, and empty
            return found

        return instead

    real_open, real_write, path_open = os.open, os.write, Path.open
    os.write = counted("write", os.write)
    os.fsync = counted("fsync", os.fsync)
    os.open = counted("create", os.open, lambda _path, flags, *_rest, **_options: bool(flags & os.O_CREAT))
    Path.open = counted("create", path_open, lambda _path, mode="r", *_rest, **_options: "w" in mode)
    Path.replace = counted("rename", Path.replace)
    Path.unlink = counted("unlink", Path.unlink, lambda path, *_rest, **_options: path.exists())
    Path.mkdir = counted("mkdir", Path.mkdir, lambda path, *_rest, **_options: not path.exists())


def save(folder: Path, rank: int, world_size: int, store: Path, tag: str, version: int) -> None:
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=store.as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=TIMEOUT_S / 2),
        )
    engine(world_size).save(folder, tag, snapshot(version, rank, world_size), latest=True)


def killed_save(*args, victim: bool, point: int, report: Path) -> None:
    if victim:
        die_before(point, report)
    save(*args)


def check(folder: Path, tag: str, report: Path) -> None:
    """Load what ``latest`` names, and every tag that must be there; then save again over what the crash left."""
    if tag == "new":
        assert version_of(folder, "same") == 1, "the previous checkpoint is untouched"
    named = (folder / "latest").read_text()
    version = version_of(folder, named)
    assert version in (1, 2)
    engine(1).save(folder, tag, snapshot(3, 0, 1), latest=True)
    assert version_of(folder, tag) == 3
    files = read(folder / tag).files
    assert sorted(os.listdir(folder / tag)) == sorted(["checkpoint.json", *files]), "leftovers of the crash"  # noqa: PTH208
    assert not list(folder.glob("*.tmp")), "leftovers of the crash"
    report.write_text(str(version))


def fork(work, *args, **kwargs) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            # A rank whose peer was killed must end by itself; what does not is shown, and ended.
            faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
            work(*args, **kwargs)
            code = 0
        except Exception:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def end_of(pids: list[int]) -> list[int]:
    """Return how each process ended: its exit code, or minus the signal."""
    ends, until = {}, time.monotonic() + TIMEOUT_S + 10
    while len(ends) < len(pids):
        for pid in pids:
            if pid not in ends and (status := os.waitpid(pid, os.WNOHANG))[0]:
                ends[pid] = os.waitstatus_to_exitcode(status[1])
        assert time.monotonic() < until
        time.sleep(0.002)
    return [ends[pid] for pid in pids]


def main(root: Path, world_size: int) -> None:
    import ds_core.comm.together  # noqa: F401  loaded once, before any process forks

    before = root / "before"
    before.mkdir()
    ends = end_of([fork(save, before, rank, world_size, root / "store", "same", 1) for rank in range(world_size)])
    assert ends == [0] * world_size
    cases = []
    for tag in ("same", "new"):
        for victim in range(world_size):
            for point in range(100):
                folder = root / f"{tag}_{victim}_{point}"
                shutil.copytree(before, folder)
                store = root / f"store_{tag}_{victim}_{point}"
                operation = root / f"operation_{tag}_{victim}_{point}"
                pids = [
                    fork(
                        killed_save,
                        folder,
                        rank,
                        world_size,
                        store,
                        tag,
                        2,
                        victim=rank == victim,
                        point=point,
                        report=operation,
                    )
                    for rank in range(world_size)
                ]
                ends = end_of(pids)
                if ends[victim] == 0:
                    assert ends == [0] * world_size, "nobody was killed"
                    break
                assert ends[victim] == -signal.SIGKILL
                # The other one hears of it where it waits for the victim; it may have ended before.
                assert all(end in (0, 1) for rank, end in enumerate(ends) if rank != victim), ends
                report = root / "report"
                assert end_of([fork(check, folder, tag, report)]) == [0], f"killed rank {victim} before {point}, {tag}"
                cases.append(
                    {
                        "tag": tag,
                        "rank": victim,
                        "operation": operation.read_text(),
                        "loaded": int(report.read_text()),
                    }
                )
            else:
                raise AssertionError("a save of more than 100 operations")
    print(json.dumps(cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
