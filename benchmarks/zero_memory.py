"""Bytes of model state per rank by ZeRO stage and number of ranks, beside what the formulas say.

A stack of linear layers is trained at stages 0, 1 and 2 with AdamW; live bytes are read between backward and step of
the third step, when weights, gradients, masters and optimizer state are all there and activations are not. The formulas
are of Rajbhandari et al. 2019, arXiv:1910.02054, section 3.1; what is above them is buffers of collectives.

    python benchmarks/zero_memory.py
    python benchmarks/zero_memory.py --plot zero_memory.png       # needs matplotlib
    python benchmarks/zero_memory.py --smoke                      # one and two ranks
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import torch
from _ranks import Ranks, launch, launcher_ranks
from _report import Row, add_output_arguments, exact_ratio_row, finish
from torch import nn

STAGES = (0, 1, 2)
WORLDS = (1, 2, 4, 8)
WIDTH, LAYERS = 128, 60
BUCKET_NUMEL = WIDTH * (WIDTH + 1)
"""Of one layer, so that buffers are small beside the model, as they are in large ones."""
GRADIENT, MOMENTS = {"fp32": 4, "bf16": 2}, 8
"""Bytes of an element; a weight has as many as its gradient."""
MIB = 2**20


def formula(stage: int, world: int, dtype: str) -> tuple[float, float, float]:
    """Return bytes per parameter on one rank: of the weight, its gradient, and masters with optimizer state."""
    width = GRADIENT[dtype]
    divided = MOMENTS + (4 if width < 4 else 0)
    return width, width / (world if stage >= 2 else 1), divided / (world if stage >= 1 else 1)


def state_worker(ranks: Ranks, dtype: str) -> dict[str, Any]:
    """Return the elements of the model, and by stage the live bytes of the rank that has most."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        gc.collect()
        if ranks.device.type == "cpu":
            from ds_core.testing.memory import LiveStorage

            with LiveStorage() as live:
                found["numel"] = _to_third_step(stage, dtype, ranks)
                nbytes = live.live_bytes
        else:
            before = torch.cuda.memory_allocated(ranks.device)
            found["numel"] = _to_third_step(stage, dtype, ranks)
            nbytes = torch.cuda.memory_allocated(ranks.device) - before
        found[str(stage)] = ranks.slowest(nbytes)
        _engines.pop().destroy()
    return found


_engines: list[Any] = []
"""That of the stage at hand: kept alive while its bytes are read."""


def _to_third_step(stage: int, dtype: str, ranks: Ranks) -> int:
    import ds_core

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "log_level": "warning",
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET_NUMEL},
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).to(ranks.device)
    engine = ds_core.initialize(model=model, config=config)[0]
    _engines.append(engine)
    for step in range(3):
        inputs = torch.ones(1, WIDTH, device=ranks.device, dtype=next(model.parameters()).dtype)
        engine.backward(engine(inputs).float().square().mean())
        if step < 2:
            engine.step()
    return sum(parameter.numel() for parameter in model.parameters())


def draw(answers: dict[tuple[str, int], dict[str, Any]], path: Path) -> None:
    """Draw stacked bars of the formulas with what was measured on them: a panel per dtype."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(dtype for dtype, _ in answers))
    worlds = list(dict.fromkeys(world for _, world in answers))
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(5.2 * len(dtypes), 4.2), layout="constrained", sharey=True, squeeze=False
    )
    parts = {"weights": "tab:blue", "gradients": "tab:orange", "masters and optimizer state": "tab:green"}
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        ticks, labels = [], []
        for at, world in enumerate(worlds):
            for stage in STAGES:
                x = at * (len(STAGES) + 1) + stage
                ticks.append(x)
                labels.append(str(stage))
                bottom = 0.0
                for (name, color), nbytes in zip(parts.items(), formula(stage, world, dtype), strict=True):
                    axes.bar(x, nbytes, 0.85, bottom=bottom, color=color, label=name if not ticks[1:] else None)
                    bottom += nbytes
                measured = answers[dtype, world][str(stage)] / answers[dtype, world]["numel"]
                axes.plot(x, measured, "kD", markersize=4, label="measured, with buffers" if not ticks[1:] else None)
            ranks = f"{world} rank{'s' * (world > 1)}"
            axes.annotate(ranks, (at * 4 + 1, 0), (0, -26), "data", "offset points", ha="center")
        axes.set_xticks(ticks, labels)
        axes.set_title("fp32" if dtype == "fp32" else f"{dtype}, fp32 masters")
        axes.set_xlabel("stage", labelpad=18)
        axes.grid(axis="y", alpha=0.3)
    panels[0][0].set_ylabel("bytes per parameter, on each rank")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=list(GRADIENT), nargs="+", default=list(GRADIENT), help="default: both")
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N", help="default: 1, 2, 4, 8; at most one per GPU")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw it there")
    parser.add_argument("--smoke", action="store_true", help="one and two ranks")
    add_output_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    launched, gpus = launcher_ranks(), torch.cuda.device_count()
    worlds = [launched] if launched else arguments.ranks or (WORLDS[:2] if arguments.smoke else WORLDS)
    if gpus and not launched and not arguments.ranks:
        worlds = [world for world in worlds if world <= gpus]
    answers: dict[tuple[str, int], dict[str, Any]] = {}
    rows: list[Row] = []
    for dtype in arguments.dtype:
        for world in worlds:
            answer = launch(state_worker, dtype, ranks=world)
            if answer is None:  # not rank 0 of a launcher
                continue
            answers[dtype, world] = answer
            for stage in STAGES:
                nbytes = answer["numel"] * sum(formula(stage, world, dtype))
                name = f"state, stage {stage}, {dtype}, {world} rank{'s' * (world > 1)}, vs formula"
                rows.append(exact_ratio_row(name, answer[str(stage)] / MIB, nbytes / MIB, None, unit="MiB"))
    if not rows:
        return 0
    if arguments.plot:
        draw(answers, arguments.plot)
    settings = {"ranks": list(worlds), "dtypes": arguments.dtype, "layers": LAYERS, "width": WIDTH}
    return finish("model state per rank", rows, settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
