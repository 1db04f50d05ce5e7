"""The whole life of a training run, in a few minutes on two CPU cores: train, stop, resume, plot, sample.

    nox -s demo                      or, where ds-core, ds-launcher and ds-fp16 are installed: python examples/demo.py
    nox -s demo -- --precision fp32  the same in fp32; or fp16, autocast; bf16 is the default
    nox -s demo -- -- --zero 2       the same with optimizer state and gradients divided; needs ds-zero

Each step is a command that works by itself; the demo only prints and runs one after the other. What they write is in
``runs/demo``. ``examples/gpt/README.md`` walks through the code.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS = 600
PROMISED = 2.2
"""Nats per byte on held-out files; guessing alone costs ln 256 = 5.55."""


def main() -> int:
    args = parse_arguments()
    begin = time.monotonic()
    ds, gpt = Path(sys.executable).with_name("ds"), HERE / "gpt"
    train = [ds, "run", "--nproc", args.nproc, gpt / "train.py", "--out", args.out, "--steps", args.steps]
    train += ["--precision", args.precision, *args.train_options]

    run("Train on the source of Python's standard library, and stop half way:", *train, "--stop-after", args.steps // 2)
    run("Go on from the checkpoint, as if nothing had happened:", *train, "--resume")
    run("Draw the loss:", sys.executable, gpt / "plot.py", "--out", args.out)
    run("Let the model write code:", sys.executable, gpt / "sample.py", "--out", args.out)

    lines = [json.loads(line) for line in (args.out / "history.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    after = f"{losses[-1]:.2f} after {lines[-1]['step']} steps in {args.precision}"
    print(f"""
Validation loss: {losses[0]:.2f} nats per byte before training, {after}.
{time.monotonic() - begin:.0f} seconds in all. What is left of it:
  {args.out / "loss.png"}  the loss, with a mark where the run was stopped and resumed
  {args.out / "history.jsonl"}  the numbers behind it
  {args.out / "latest"}  names the newest checkpoint, a folder beside it""")
    if args.steps == STEPS and losses[-1] >= PROMISED:
        print(f"The loss should be below {PROMISED}: something is wrong with this build.", file=sys.stderr)
        return 1
    return 0


def run(title: str, *words: object) -> None:
    """Print and run a command; a failure ends the demo with its exit code, its own output says why."""
    command = [str(word) for word in words]
    print(f"\n{title}\n$ {shlex.join(command)}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        sys.exit(code)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=default_nproc(), help="ranks, each a process")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps; fewer end before the schedule does")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16", "autocast"], default="bf16")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything it writes")
    parser.add_argument("train_options", nargs="*", help="after a --: passed on to train.py")
    return parser.parse_args()


def default_nproc() -> int:
    """Return 2, except on a machine with a single GPU: two ranks cannot share it."""
    import torch

    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


if __name__ == "__main__":
    sys.exit(main())
