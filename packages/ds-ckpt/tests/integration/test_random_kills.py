"""``kill -9`` of a random rank of a real training run, at a random moment of its saves, again and again in one folder.

Four ranks train and save every step. After each kill the folder must load, be one whole checkpoint, and hold what a
run that nobody killed had at that step, bit for bit; the next run goes on from it. This file is also the script that
does it: it imports torch once, and forks for every process.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

import ds_ckpt
import ds_core
from ds_ckpt.verify import find_damage
from ds_core import comm
from ds_core.checkpoint.folder import complete_tags
from ds_core.interfaces.logical import logical_name
from ds_core.testing import crash

WORLD = 4
STEPS_OF_A_RUN = 4
TIMEOUT_S = 60.0
ENGINES = sorted(
    {"sharded", "async"} & {point.name for point in importlib.metadata.entry_points(group="ds_core.checkpoint")}
)


def check_kills(folder: Path, engine: str, kills: int, seed: int) -> None:
    print(f"seed {seed}; again: DS_KILLS_SEED={seed}")
    cases = crash.run_script(__file__, folder, engine, kills, seed, timeout_s=60.0 + 4.0 * kills)
    assert len(cases) == kills
    assert {case["how"] for case in cases} == {"operations", "bytes"}
    # The victims were at different places of their saves, and training got on.
    assert len({case["rank"] for case in cases}) > 1
    assert len({case["operation"] for case in cases}) > 1
    steps = [case["step"] for case in cases]
    assert steps == sorted(steps)
    assert steps[-1] > steps[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_runs_that_are_killed_go_on_from_a_whole_checkpoint(engine, tmp_path):
    check_kills(tmp_path, engine, kills=6, seed=int(os.environ.get("DS_KILLS_SEED", "1")))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_hundred_runs_that_are_killed_go_on_from_a_whole_checkpoint(engine, tmp_path):
    seed = int(os.environ.get("DS_KILLS_SEED", random.SystemRandom().randrange(10**6)))
    check_kills(tmp_path, engine, kills=200, seed=seed)


# -- the script -------------------------------------------------------------------------------------------------------


def config_of(engine: str) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.05}},
        "log_level": "error",
        "checkpoint": {
            "engine": engine,
            **(
                {}
                if engine == "plain"
                else {engine: {"writers": 2, "chunk_bytes": 256, "keep_last": 3, "keep_every": 50}}
            ),
        },
    }


def build(rank: int, store: Path, engine: str):
    comm.init_distributed(init_method=store.as_uri(), rank=rank, world_size=WORLD, verbose=False)
    torch.manual_seed(0)
    # Dropout, so that random generators that were not restored would show in the next step.
    layers = [torch.nn.Linear(5, 9), torch.nn.Dropout(0.3), torch.nn.Linear(9, 7), torch.nn.Linear(7, 1, bias=False)]
    model = torch.nn.Sequential(*layers)
    built = ds_core.initialize(model=model, config=config_of(engine))[0]
    torch.manual_seed(100 + rank)
    return built


def train_a_step(engine, rank: int) -> None:
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(10 * engine.global_steps + rank))
    engine.backward(engine(x).square().mean())
    engine.step()


def digest(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()[:16]
        for name, value in sorted(tensors.items())
    }


def in_engine(engine) -> dict[str, str]:
    found = {}
    for name, param in engine.module.named_parameters():
        found[f"weight {logical_name(name)}"] = param
        found.update({f"{slot} {logical_name(name)}": value for slot, value in engine.optimizer.state[param].items()})
    return digest(found)


def in_folder(folder: Path, tag: str | None) -> tuple[int, dict[str, str]]:
    """Return step and content of a checkpoint of which every byte is what was written."""
    with ds_ckpt.open(folder, tag) as checkpoint:
        assert list(find_damage(checkpoint.stored, lambda nbytes: None)) == []
        found = {
            f"{kind} {name}": checkpoint.tensor(name, kind)
            for name in checkpoint.names()
            for kind in checkpoint.kinds(name)
        }
        step = checkpoint.state["global_steps"]
        assert checkpoint.client_state == {"step": step}
    return step, digest(found)


def never_killed(root: Path, rank: int, steps: int) -> None:
    """Train without saving, and note the content after each step."""
    engine = build(rank, root / "store_reference", "plain")
    contents = []
    for _ in range(steps):
        train_a_step(engine, rank)
        contents.append(in_engine(engine) if rank == 0 else None)
    if rank == 0:
        (root / "reference.json").write_text(json.dumps(contents))


def run(root: Path, rank: int, number: int, engine_name: str, tag: str, kill: dict | None) -> None:
    """Go on in the folder and save every step, until killed or some steps further."""
    engine = build(rank, root / f"store_{number}", engine_name)
    folder = root / "folder"
    if (folder / "latest").exists():
        engine.load_checkpoint(folder)
    if kill is not None:
        crash.die_at(**kill, note=root / "operation")
    points = nbytes = 0

    def count(operation: crash.Operation) -> None:
        nonlocal points, nbytes
        points += 1 + (len(operation.data) > 1)
        nbytes += len(operation.data)

    with crash.watched(count):
        for _ in range(STEPS_OF_A_RUN):
            train_a_step(engine, rank)
            step = engine.global_steps
            engine.save_checkpoint(folder, tag=tag.format(step=step), client_state={"step": step})
        engine.destroy()
    (root / f"counts_{rank}.json").write_text(json.dumps({"operations": points, "bytes": nbytes}))


def look(root: Path, tag: str, before: int) -> None:
    """Check all that is in the folder; note the step it is at."""
    expected = json.loads((root / "reference.json").read_text())
    folder = root / "folder"
    step, found = in_folder(folder, None)
    assert before <= step <= before + STEPS_OF_A_RUN, f"at step {step} after a run that began at {before}"
    for name in (None, *complete_tags(folder)):
        of_step, found = in_folder(folder, name)
        reference = expected[of_step - 1]
        assert found.keys() == reference.keys()
        different = [key for key in reference if found[key] != reference[key]]
        assert not different, f"{name or 'latest'}, of step {of_step}, is a mixture: {different} are of another step"
    (root / "step").write_text(str(step))


def main(root: Path, engine: str, kills: int, seed: int) -> None:
    import_everything(engine)
    chosen = random.Random(seed)
    folder = root / "folder"
    folder.mkdir()
    steps = STEPS_OF_A_RUN * (3 * kills + 1)
    assert ends([crash.fork(never_killed, root, rank, steps) for rank in range(WORLD)]) == [0] * WORLD
    assert ends([crash.fork(run, root, rank, 0, engine, "step{step}", None) for rank in range(WORLD)]) == [0] * WORLD
    counts = [json.loads((root / f"counts_{rank}.json").read_text()) for rank in range(WORLD)]
    assert ends([crash.fork(look, root, "", 0)]) == [0]
    cases: list[dict] = []
    number = 0
    while len(cases) < kills:
        assert number < 3 * kills, "hardly any run was killed"
        number += 1
        victim, how = chosen.randrange(WORLD), chosen.choice(["operations", "bytes"])
        # Anywhere in the saves of a run; the last of them may need fewer operations than the first.
        at = chosen.randrange(counts[victim][how] * 3 // 4)
        tag = chosen.choice(["step{step}", "step{step}", "same"])
        before = int((root / "step").read_text())
        said = f"run {number} from step {before}, tag {tag}: rank {victim} after {at} {how}"
        print(said, file=sys.stderr, flush=True)
        kill = {"point" if how == "operations" else "nbytes": at}
        pids = [
            crash.fork(run, root, rank, number, engine, tag, kill if rank == victim else None, timeout_s=TIMEOUT_S)
            for rank in range(WORLD)
        ]
        ended = ends(pids)
        if ended == [0] * WORLD and not (root / "operation").exists():
            print("it ended before", file=sys.stderr)
            assert ends([crash.fork(look, root, tag, before)]) == [0], said
            continue
        assert all(end in (0, 1) for rank, end in enumerate(ended) if rank != victim), f"{said}: {ended}"
        assert ended[victim] == -signal.SIGKILL, f"{said}: {ended}"
        assert ends([crash.fork(look, root, tag, before)]) == [0], f"{said}, before {(root / 'operation').read_text()}"
        step = int((root / "step").read_text())
        cases.append({"rank": victim, "how": how, "operation": (root / "operation").read_text(), "step": step})
        (root / "operation").unlink()
        # Old ones are removed all the time, too, which the kills hit as well.
        at_multiples = [tag for tag in complete_tags(folder) if tag.endswith("0")]
        assert len(complete_tags(folder)) <= 4 + len(at_multiples), f"{said}: {complete_tags(folder)}"
    print(json.dumps(cases))


def ends(pids: list[int]) -> list[int]:
    return crash.ends_of(pids, TIMEOUT_S + 30)


def import_everything(engine: str) -> None:
    """Load what the processes will need, once; no process group and no thread may exist before they fork."""
    import gc

    import torch._dynamo  # by the first optimizer

    from ds_core import config, registry
    from ds_core.ops import best

    config.load_config(config_of(engine))
    best("sum_of_squares", torch.device("cpu"))
    for seam, name in (
        ("engine", "plain"),
        ("precision", "fp32"),
        ("partition", "replicated"),
        ("checkpoint", engine),
        ("checkpoint", "plain"),
        ("optimizer", "adamw"),
    ):
        registry.load(seam, name)
    gc.freeze()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
