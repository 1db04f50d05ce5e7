"""Draw the loss curve of a run: reads ``history.jsonl``, writes ``loss.png``: ``python plot.py --out runs/gpt``."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl

# Files only: a machine that trains rarely has a screen.
mpl.use("Agg")
import matplotlib.pyplot as plt
from progress import read_history


def smooth(values: list[float], weight: float = 0.8) -> list[float]:
    """Return the exponential moving average, corrected for its start (as Adam corrects its moments)."""
    smoothed, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


def plot(folder: Path) -> Path:
    """Draw the history in ``folder`` and return the picture's path."""
    history = list(read_history(folder))
    training = [(line["step"], line["loss"]) for line in history if "loss" in line]
    validation = [(line["step"], line["validation_loss"]) for line in history if "validation_loss" in line]
    resumed = [line["step"] for line in history if "resumed" in line]

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps, losses = [step for step, _ in training], [loss for _, loss in training]
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1, label="training loss")
    axes.plot(steps, smooth(losses), color="tab:blue", linewidth=2, label="training loss, smoothed")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="tab:orange", label="validation loss")
        step, loss = validation[-1]
        axes.annotate(f"{loss:.2f}", (step, loss), (0, 7), textcoords="offset points", ha="center", weight="bold")
    for number, step in enumerate(resumed):
        axes.axvline(step, color="0.4", linestyle="--", linewidth=1, label="" if number else "stopped and resumed here")
    axes.set_title("Byte-level GPT on Python's standard library")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpt"), help="folder that train.py wrote")
    print(plot(parser.parse_args().out))


if __name__ == "__main__":
    main()
