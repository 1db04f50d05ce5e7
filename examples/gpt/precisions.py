"""Train the same model on the same data in several precisions, and compare the losses.

    python precisions.py                              a tiny GPT in all four, 600 steps, from two seeds: a few minutes
    python precisions.py --model demo --seeds 1       the demo's GPT, 600 steps: as long as four demos
    python precisions.py --precisions fp32 bf16       only these
    python precisions.py --reuse                      only the runs that are not in --out yet

Each run is ``train.py``; with the same seed two runs begin with the same weights and see the same bytes at every step.
Rounding alone then leads them apart, and at a high learning rate further and further, in fp32 as well. So there is a
yardstick: fp32 once more, with the gradients of a step summed in another order. What it differs by says nothing about a
precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
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
REFERENCE, YARDSTICK = "fp32", "fp32 reordered"
PROMISED = 0.02
"""Nats per byte that a precision may end away from fp32, from any seed."""


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
    seed: int
    validation_loss: float
    """Nats per byte after the last step."""
    difference: float
    """To fp32 from the same seed; positive: worse."""
    skipped_steps: int
    loss: list[tuple[int, float]]
    """(step, training loss), the mean over the steps since the last."""
    validation: list[tuple[int, float]]


def main() -> int:
    args = parse_arguments()
    case = CASES[args.model]
    args.out.mkdir(parents=True, exist_ok=True)
    precisions = [REFERENCE, *(name for name in args.precisions or case.precisions if name != REFERENCE)]
    if args.yardstick:
        precisions.append(YARDSTICK)
    runs: list[Run] = []
    for seed in range(args.seeds):
        for precision in precisions:
            folder = args.out / f"{args.model}_{precision.replace(' ', '_')}_seed{seed}"
            if not (args.reuse and is_complete(folder, args.steps)):
                train(precision, seed, folder, case, args)
            runs.append(read(precision, seed, folder, runs))
    table = as_table(case, runs, args)
    (args.out / f"{args.model}.txt").write_text(table)
    (args.out / f"{args.model}.json").write_text(as_json(case, runs, args))
    draw(case, runs, args.out / f"{args.model}.png")
    print(f"\n{table}\n{args.out / args.model}.png shows the curves, .json has the numbers.")
    return 0 if all(is_kept(precision, runs) for precision in precisions) else 1


def configuration(case: Case, steps: int) -> dict[str, Any]:
    """Return the demo's configuration with the case's batch, and a schedule that ends at ``steps``."""
    config: dict[str, Any] = json.loads((HERE / "ds_config.json").read_text())
    schedule = config["scheduler"]["params"]
    schedule["warmup_num_steps"] = round(schedule["warmup_num_steps"] * steps / schedule["total_num_steps"])
    schedule["total_num_steps"] = steps
    return {**config, "train_micro_batch_size_per_gpu": case.micro_batch}


def is_complete(folder: Path, steps: int) -> bool:
    """Say whether a run of ``steps`` steps has ended in ``folder``."""
    return any(line["step"] == steps and "validation_loss" in line for line in read_history(folder))


def train(precision: str, seed: int, folder: Path, case: Case, args: argparse.Namespace) -> None:
    """Run train.py; where it fails this script ends with it, its own output says why."""
    config = configuration(case, args.steps)
    if precision == YARDSTICK:
        # As many windows a step, in twice as many micro-batches: equal sums in another order.
        config |= {"train_micro_batch_size_per_gpu": case.micro_batch // 2, "gradient_accumulation_steps": 2}
    path = folder.with_suffix(".config.json")
    path.write_text(json.dumps(config, indent=2))
    words = [Path(sys.executable).with_name("ds"), "run", "--nproc", args.nproc, HERE / "train.py", "--config", path]
    words += ["--precision", precision.split()[0], "--seed", seed, "--out", folder, "--steps", args.steps]
    words += ["--validate-every", max(1, args.steps // 12), "--save-every", args.steps]
    print(f"\n{precision}, seed {seed}: {case.title}, {args.steps} steps", flush=True)
    subprocess.run([str(word) for word in (*words, *case.options, *args.train_options)], check=True)


def read(precision: str, seed: int, folder: Path, before: list[Run]) -> Run:
    """Return the run whose history is in ``folder``; ``before`` has fp32 from the same seed, unless this is it."""
    history = list(read_history(folder))
    training = [line for line in history if "loss" in line]
    validation = [(line["step"], round(line["validation_loss"], 5)) for line in history if "validation_loss" in line]
    final = validation[-1][1]
    reference = [run.validation_loss for run in before if (run.precision, run.seed) == (REFERENCE, seed)]
    return Run(
        precision,
        seed,
        final,
        round(final - reference[0], 5) if reference else 0.0,
        training[-1]["skipped_steps"],
        [(line["step"], round(line["loss"], 5)) for line in training],
        validation,
    )


def is_kept(precision: str, runs: list[Run]) -> bool:
    """Say whether ``precision`` ended as near to fp32 as promised; nothing is promised of the yardstick.

    From every seed: in a mean, one seed's gain would hide another's loss.
    """
    return precision == YARDSTICK or all(abs(run.difference) <= PROMISED for run in runs if run.precision == precision)


def as_table(case: Case, runs: list[Run], args: argparse.Namespace) -> str:
    seeds = "".join(f"{f'seed {seed}':>9}" for seed in range(args.seeds))
    lines = [
        f"{case.title}; {args.steps} steps on {args.nproc} ranks",
        "validation loss of fp32 in nats per byte, and how far the others end from it, seed by seed",
        "",
        f"{'':<16}{seeds}{'mean':>9}{'skipped':>9}  within {PROMISED}",
    ]
    for precision in dict.fromkeys(run.precision for run in runs):
        own = [run for run in runs if run.precision == precision]
        is_reference = precision == REFERENCE
        numbers = [run.validation_loss if is_reference else run.difference for run in own]
        cells = "".join(f"{number:>9.4f}" if is_reference else f"{number:>+9.4f}" for number in numbers)
        mean = f"{statistics.mean(numbers):>{'' if is_reference else '+'}9.4f}"
        skipped = "+".join(str(run.skipped_steps) for run in own)
        verdict = "" if precision in (REFERENCE, YARDSTICK) else "yes" if is_kept(precision, runs) else "NO"
        lines.append(f"{precision:<16}{cells}{mean}{skipped:>9}  {verdict}".rstrip())
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
    """Draw the curves of the first seed, and below them how far each run is from fp32 of its seed."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1), layout="constrained")
    references = {run.seed: dict(run.validation) for run in runs if run.precision == REFERENCE}
    colors = {precision: f"C{number}" for number, precision in enumerate(dict.fromkeys(run.precision for run in runs))}
    for run in runs:
        color, style = colors[run.precision], "--" if run.precision == YARDSTICK else "-"
        if run.seed == 0:
            steps, losses = zip(*run.loss, strict=True)
            upper.plot(steps, smooth(list(losses)), style, color=color, linewidth=1, alpha=0.7)
            upper.plot(*zip(*run.validation, strict=True), "o", color=color, markersize=4, label=run.precision)
        if run.precision != REFERENCE:
            away = [(step, loss - references[run.seed][step]) for step, loss in run.validation]
            lower.plot(*zip(*away, strict=True), style, color=color, linewidth=1, marker=".", markersize=5)
    upper.set_title(case.title[0].upper() + case.title[1:])
    upper.set_ylabel("loss (nats per byte), seed 0\nlines: training, smoothed; dots: validation")
    upper.legend()
    lower.axhspan(-PROMISED, PROMISED, color="0.9")
    lower.set(xlabel="optimizer step", ylabel="validation loss less fp32's\na line for each seed", ylim=(-0.1, 0.1))
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
    parser.add_argument("--seeds", type=int, default=2, help="how many: 0, 1, ... choose the weights to begin with")
    parser.add_argument("--no-yardstick", dest="yardstick", action="store_false", help="leave fp32 reordered out")
    parser.add_argument("--reuse", action="store_true", help="keep runs in --out that have come to their end")
    parser.add_argument("--out", type=Path, default=Path("runs/precisions"))
    parser.add_argument("train_options", nargs="*", help="after a --: passed on to train.py")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
