"""SIGKILL at every rename, sync and removal of an engine's save, on either rank: old or new, but whole (P11).

The contract of checkpoint engines kills saves of a snapshot; here whole engines save, on one and on two ranks. This
file is also the script that does it: it imports torch once, and forks for every process of every case.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ds_core
from ds_core import comm

TIMEOUT_S = 30.0
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.05}},
    "log_level": "error",
}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_save_killed_at_any_point_leaves_a_whole_checkpoint(world_size, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
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
            # A rank's own file is synced and renamed in its folder; rank 0 goes on with the manifest and ``latest``.
            assert len(found) >= (10 if killed_rank == 0 else 3), "too few points to mean anything"
            loaded = [case["loaded"] for case in found]
            assert loaded == sorted(loaded), "once it is the new one it stays the new one"
            assert loaded[0] == 1
            if killed_rank == 0:
                assert loaded[-1] == 2


# -- the script -------------------------------------------------------------------------------------------------------


def build():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 1))
    return ds_core.initialize(model=model, config=CONFIG)[0]


def train_a_step(engine) -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(engine.global_steps))  # equal on every rank
    engine.backward(engine(x).square().mean())
    engine.step()


def everything(engine) -> dict[str, torch.Tensor]:
    found = dict(engine.module.state_dict())
    for name, param in engine.module.named_parameters():
        found.update({f"{slot} {name}": value for slot, value in engine.optimizer.state[param].items()})
    return {name: value.clone() for name, value in found.items()}


def die_before(point: int) -> None:
    """Kill this process before its ``point``-th rename, sync or removal of a file."""
    seen = 0

    def counted(call):
        def instead(*args, **kwargs):
            nonlocal seen
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
            return call(*args, **kwargs)

        return instead

    os.fsync = counted(os.fsync)
    Path.replace = counted(Path.replace)
    Path.unlink = counted(Path.unlink)


def join(rank: int, world_size: int, store: Path) -> None:
    comm.init_distributed(init_method=store.as_uri(), rank=rank, world_size=world_size, verbose=False)


def first_save(folder: Path, rank: int, world_size: int, store: Path) -> None:
    """Save after one step; note what is there then and after another one."""
    join(rank, world_size, store)
    engine = build()
    for step in (1, 2):
        train_a_step(engine)
        if rank == 0:
            torch.save(everything(engine), folder.parent / f"expected_{step}.pt")
        if step == 1:
            engine.save_checkpoint(folder, tag="same", client_state={"step": 1})


def killed_save(folder: Path, rank: int, world_size: int, store: Path, tag: str, victim: int, point: int) -> None:
    join(rank, world_size, store)
    engine = build()
    engine.load_checkpoint(folder)
    train_a_step(engine)
    if rank == victim:
        die_before(point)
    engine.save_checkpoint(folder, tag=tag, client_state={"step": 2})


def check(folder: Path, tag: str, report: Path) -> None:
    """Load what ``latest`` names, and every tag that must be there; then save again over what the crash left."""
    comm.init_distributed()
    engine = build()

    def load(wanted: str | None) -> int:
        _, client_state = engine.load_checkpoint(folder, tag=wanted)
        step = client_state["step"]
        assert engine.global_steps == step
        expected = torch.load(folder.parent / f"expected_{step}.pt", weights_only=True)
        found = everything(engine)
        assert found.keys() == expected.keys()
        different = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not different, f"not whole: {different} are not of step {step}"
        return step

    if tag == "new":
        assert load("same") == 1, "the previous checkpoint is untouched"
    loaded = load(None)
    engine.save_checkpoint(folder, tag=tag, client_state={"step": loaded})
    assert load(None) == loaded
    files = json.loads((folder / tag / "checkpoint.json").read_text())["files"]
    assert sorted(os.listdir(folder / tag)) == sorted(["checkpoint.json", *files]), "leftovers of the crash"  # noqa: PTH208
    assert not list(folder.glob("*.tmp")), "leftovers of the crash"
    report.write_text(str(loaded))


def fork(work, *args) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            # A rank whose peer was killed must end by itself; what does not is shown, and ended.
            faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
            work(*args)
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


def import_everything() -> None:
    """Load what the processes will need, once; no process group and no thread may exist before they fork."""
    import safetensors  # noqa: F401
    import torch._dynamo  # by the first optimizer

    from ds_core import config, registry
    from ds_core.ops import best

    config.load_config(CONFIG)
    best("sum_of_squares", torch.device("cpu"))
    for seam, name in (
        ("engine", "plain"),
        ("precision", "fp32"),
        ("partition", "replicated"),
        ("checkpoint", "plain"),
    ):
        registry.load(seam, name)
    registry.load("optimizer", "adamw")


def main(root: Path, world_size: int) -> None:
    import_everything()
    before = root / "before"
    before.mkdir()
    ends = end_of([fork(first_save, before, rank, world_size, root / "store") for rank in range(world_size)])
    assert ends == [0] * world_size
    cases = []
    for tag in ("same", "new"):
        for victim in range(world_size):
            for point in range(60):
                folder = root / f"{tag}_{victim}_{point}"
                shutil.copytree(before, folder)
                store = root / f"store_{tag}_{victim}_{point}"
                args = (world_size, store, tag, victim, point)
                ends = end_of([fork(killed_save, folder, rank, *args) for rank in range(world_size)])
                if ends[victim] == 0:
                    assert ends == [0] * world_size, "nobody was killed"
                    break
                assert ends[victim] == -signal.SIGKILL
                # The other one hears of it where it waits for the victim; it may have ended before.
                assert all(end in (0, 1) for rank, end in enumerate(ends) if rank != victim), ends
                report = root / "report"
                assert end_of([fork(check, folder, tag, report)]) == [0], f"killed rank {victim} before {point}, {tag}"
                cases.append({"tag": tag, "rank": victim, "point": point, "loaded": int(report.read_text())})
            else:
                raise AssertionError("a save of more than 60 operations")
    print(json.dumps(cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
