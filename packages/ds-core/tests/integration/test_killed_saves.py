"""SIGKILL at every rename, sync and removal of an engine's save, on either rank: old or new, but whole (P11).

The contract of checkpoint engines kills saves of a snapshot; here whole engines save, on one and on two ranks. This
file is also the script that does it: it imports torch once, and forks for every process of every case.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

import ds_core
from ds_core import comm
from ds_core.testing import crash

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.05}},
    "log_level": "error",
    "checkpoint": {"engine": "plain"},
}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_save_killed_at_any_point_leaves_a_whole_checkpoint(world_size, tmp_path):
    cases = crash.run_script(__file__, tmp_path, world_size)
    for tag in ("same", "new"):
        for killed_rank in range(world_size):
            found = [case for case in cases if (case["name"], case["rank"]) == (tag, killed_rank)]
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


def join(rank: int, world_size: int, store: Path) -> None:
    comm.init_distributed(init_method=store.as_uri(), rank=rank, world_size=world_size, verbose=False)


def first_save(folder: Path, root: Path, rank: int, world_size: int, store: Path) -> None:
    """Save after one step; note what is there then and after another one."""
    join(rank, world_size, store)
    engine = build()
    for step in (1, 2):
        train_a_step(engine)
        if rank == 0:
            torch.save(everything(engine), root / f"expected_{step}.pt")
        if step == 1:
            engine.save_checkpoint(folder, tag="same", client_state={"step": 1})


def killed_save(folder: Path, rank: int, world_size: int, store: Path, tag: str) -> None:
    join(rank, world_size, store)
    engine = build()
    engine.load_checkpoint(folder)
    train_a_step(engine)
    if world_size > 1:
        # Which rank makes the folder is a race, and with it every later operation would have another number each time.
        (folder / tag).mkdir(exist_ok=True)
    crash.ready()
    engine.save_checkpoint(folder, tag=tag, client_state={"step": 2})


def check(folder: Path, tag: str, root: Path) -> int:
    """Load what ``latest`` names, and every tag that must be there; then save again over what the crash left."""
    comm.init_distributed()
    engine = build()

    def load(wanted: str | None) -> int:
        _, client_state = engine.load_checkpoint(folder, tag=wanted)
        step = client_state["step"]
        assert engine.global_steps == step
        expected = torch.load(root / f"expected_{step}.pt", weights_only=True)
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
    return loaded


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
    first = [crash.fork(first_save, before, root, rank, world_size, root / "store") for rank in range(world_size)]
    assert crash.ends_of(first) == [0] * world_size
    cases = crash.kill_everywhere(
        root,
        before,
        world_size,
        ("same", "new"),
        lambda folder, rank, store, tag: killed_save(folder, rank, world_size, store, tag),
        lambda folder, tag: check(folder, tag, root),
        # Writing is cut everywhere in the contract of checkpoint engines.
        only=("sync", "rename", "remove"),
    )
    print(crash.as_json(cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
