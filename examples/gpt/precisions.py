"""Train the same model on the same data in several precisions, and compare the losses.

    python precisions.py                              a tiny GPT in all four, 600 steps each: a few minutes
    python precisions.py --model demo                 the demo's GPT, 600 steps each: as long as four demos
    python precisions.py --precisions fp32 bf16       only these

Each run is ``train.py`` with the same weights to begin with and the same bytes at every step. The first run, in fp32,
is what the others are compared with. A last one, in fp32 from other weights, shows how much the weights one happens to
begin with decide: a difference that is not larger says nothing about the precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

mpl.use("Agg")
import matplotlib.pyplot as plt
from plot import smooth
from progress import read_history
from train import PRECISIONS

HERE = Path(__file__).parent
REFERENCE, OTHER_SEED = "fp32", "fp32, seed 1"
PROMISED = 0.02
"""Nats per byte that a precision may end away from fp32."""


@dataclass(frozen=True)
class Case:
    """A model to compare precisions on."""

    title: str
    options: tuple[str, ...]
    """For train.py."""
    micro_batch: int
    """Windows per rank. With few bytes a step the last bit of a number decides the path of a run, and comparing tells
    more about luck; both cases have 512 bytes per rank."""
    precisions: tuple[str, ...]


CASES = {
    "demo": Case("the demo's GPT, 4.8 million parameters", (), 2, ("fp32", "bf16", "autocast")),
    "tiny": Case(
        "a GPT of 115,000 parameters",
        ("--context=64", "--layers=2", "--heads=2", "--channels=64"),
        8,
        ("fp32", "bf16", "autocast", "fp16"),
    ),
}


@dataclass(frozen=True)
class Run:
    """What one run left."""

    precision: str
    validation_loss: float
    """Nats per byte after the last step."""
    difference: float
    """To the reference; positive: worse."""
    skipped_steps: int
    loss: list[tuple[int, float]]
    """(step, training loss), the mean over the steps since the last."""
    validation: list[tuple[int, float]]


def main() -> int:
    args = parse_arguments()
    case = CASES[args.model]
    args.out.mkdir(parents=True, exist_ok=True)
    config = args.out / f"{args.model}_config.json"
    config.write_text(json.dumps(configuration(case, args.steps), indent=2))
    precisions = [REFERENCE, *(name for name in args.precisions or case.precisions if name != REFERENCE)]
    if args.other_seed:
        precisions.append(OTHER_SEED)
    runs: list[Run] = []
    for precision in precisions:
        folder = args.out / f"{args.model}_{precision.replace(', seed ', '_seed')}"
        train(precision, folder, case, config, args)
        runs.append(read(precision, folder, runs))
    table = as_table(case, runs, args)
    (args.out / f"{args.model}.txt").write_text(table)
    (args.out / f"{args.model}.json").write_text(as_json(case, runs, args))
    draw(case, runs, args.out / f"{args.model}.png")
    print(f"\n{table}\n{args.out / args.model}.png shows the curves, .json has the numbers.")
    return 0 if all(is_kept(run) for run in runs) else 1


def configuration(case: Case, steps: int) -> dict[str, Any]:
    """Return the demo's configuration with the case's batch, and a schedule that ends at ``steps``."""
    config: dict[str, Any] = json.loads((HERE / "ds_config.json").read_text())
    schedule = config["scheduler"]["params"]
    schedule["warmup_num_steps"] = round(schedule["warmup_num_steps"] * steps / schedule["total_num_steps"])
    schedule["total_num_steps"] = steps
    return {**config, "train_micro_batch_size_per_gpu": case.micro_batch}


def train(precision: str, folder: Path, case: Case, config: Path, args: argparse.Namespace) -> None:
    """Run train.py; where it fails this script ends with it, its own output says why."""
    name, _, seed = precision.partition(", seed ")
    words = [Path(sys.executable).with_name("ds"), "run", "--nproc", args.nproc, HERE / "train.py", "--config", config]
    words += ["--precision", name, "--seed", seed or 0, "--out", folder, "--steps", args.steps, *case.options]
    words += ["--validate-every", max(1, args.steps // 12), "--save-every", args.steps, *args.train_options]
    print(f"\n{precision}: {case.title}, {args.steps} steps", flush=True)
    subprocess.run([str(word) for word in words], check=True)


def read(precision: str, folder: Path, before: list[Run]) -> Run:
    """Return the run whose history is in ``folder``; ``before`` begins with the reference, unless this is it."""
    history = list(read_history(folder))
    training = [line for line in history if "loss" in line]
    validation = [(line["step"], round(line["validation_loss"], 5)) for line in history if "validation_loss" in line]
    final = validation[-1][1]
    return Run(
        precision,
        final,
        round(final - before[0].validation_loss, 5) if before else 0.0,
        training[-1]["skipped_steps"],
        [(line["step"], round(line["loss"], 5)) for line in training],
        validation,
    )


def is_kept(run: Run) -> bool:
    """Say whether ``run`` ended as near to the reference as promised; nothing is promised of other seeds."""
    return run.precision == OTHER_SEED or abs(run.difference) <= PROMISED


def as_table(case: Case, runs: list[Run], args: argparse.Namespace) -> str:
    lines = [f"{case.title}; {args.steps} steps on {args.nproc} ranks; validation loss in nats per byte", ""]
    lines.append(
        f"{'precision':<14}{'validation loss':>16}{'against fp32':>14}{'skipped steps':>15}  within {PROMISED}"
    )
    for run in runs:
        verdict = "" if run.precision in (REFERENCE, OTHER_SEED) else "yes" if is_kept(run) else "NO"
        difference = "" if run is runs[0] else f"{run.difference:+.4f}"
        numbers = f"{run.validation_loss:>16.4f}{difference:>14}{run.skipped_steps:>15}"
        lines.append(f"{run.precision:<14}{numbers}  {verdict}".rstrip())
    return "\n".join(lines) + "\n"


def as_json(case: Case, runs: list[Run], args: argparse.Namespace) -> str:
    found = {
        "model": case.title,
        "options": [*case.options, *args.train_options],
        "steps": args.steps,
        "ranks": args.nproc,
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "promised": PROMISED,
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    return json.dumps(found) + "\n"


def draw(case: Case, runs: list[Run], path: Path) -> None:
    """Draw the curves, and below them how far each is from the reference."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1), layout="constrained")
    reference = dict(runs[0].validation)
    for number, run in enumerate(runs):
        color, style = f"C{number}", "--" if run.precision == OTHER_SEED else "-"
        steps, losses = zip(*run.loss, strict=True)
        upper.plot(steps, smooth(list(losses)), style, color=color, linewidth=1, alpha=0.7)
        upper.plot(*zip(*run.validation, strict=True), "o", color=color, markersize=4, label=run.precision)
        if number:
            away = [(step, loss - reference[step]) for step, loss in run.validation]
            lower.plot(*zip(*away, strict=True), f"o{style}", color=color, markersize=4)
    upper.set_title(case.title[0].upper() + case.title[1:])
    upper.set_ylabel("loss (nats per byte)\nlines: training, smoothed; dots: validation")
    upper.legend()
    lower.axhspan(-PROMISED, PROMISED, color="0.9")
    lower.set(xlabel="optimizer step", ylabel="validation loss\nless that of fp32", ylim=(-0.1, 0.1))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CASES, default="tiny")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="beside fp32; default: what the model has")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps; the schedule ends with them")
    parser.add_argument("--nproc", type=int, default=2, help="ranks, each a process")
    parser.add_argument("--no-other-seed", dest="other_seed", action="store_false", help="leave the last run out")
    parser.add_argument("--out", type=Path, default=Path("runs/precisions"))
    parser.add_argument("train_options", nargs="*", help="after a --: passed on to train.py")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
