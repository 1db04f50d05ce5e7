"""Train the byte-level GPT on Python's standard library: the script to copy.

    ds run --nproc 2 train.py --out runs/gpt                  two ranks, here two CPU cores or two GPUs
    ds run --nproc 2 train.py --out runs/gpt --resume         goes on from the last checkpoint
    python train.py --config my_ds_config.json                one process, another configuration
    python train.py --precision fp32                          the same configuration, but this precision
    ds run --nproc 2 train.py --zero 2                        optimizer state and gradients divided over the ranks

Batch size, optimizer, schedule, precision and ZeRO stage are read from the configuration; this file knows none of them.
``--precision`` and ``--zero`` only change what stands in the configuration.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from data import Windows
from model import GPT, GPTConfig
from progress import Report
from torch.utils.data import default_collate

import ds_core
from ds_core import comm

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from ds_core import DeepSpeedEngine

    Batch = tuple[Tensor, Tensor]

HERE = Path(__file__).parent
MODEL_FILE = "model.json"
VALIDATION_BATCHES, VALIDATION_BATCH_SIZE = 8, 8
PRECISIONS = {"fp32": None, "fp16": "fp16", "bf16": "bf16", "autocast": "torch_autocast"}
"""What ``--precision`` may be, and the section of the configuration that it enables."""


def main() -> None:
    args = parse_arguments()
    if args.precision:
        args.deepspeed_config = with_precision(read_config(args), args.precision)
    if args.zero is not None:
        args.deepspeed_config = with_stage(read_config(args), args.zero)
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(context=args.context, layers=args.layers, heads=args.heads, channels=args.channels))

    # The configuration, a path or a dict, travels in args.deepspeed_config. The engine puts the model on this rank's
    # device, makes it equal on all ranks, and builds optimizer, schedule and a loader that deals the windows out to the
    # ranks.
    engine, _, loader, _ = ds_core.initialize(
        args=args, model=model, model_parameters=model.parameters(), training_data=Windows("train", args.context)
    )
    client_state = {"seconds": 0.0}
    if args.resume:
        # Weights, optimizer, schedule, random state and the position in the data; client_state is what we had saved.
        path, client_state = engine.load_checkpoint(args.out)
        if path is None:
            raise SystemExit(f"there is no checkpoint in {args.out} to go on from: leave --resume out to start anew")
    train(engine, loader, args, seconds_before=client_state["seconds"])
    engine.destroy()
    comm.destroy_process_group()


def train(engine: DeepSpeedEngine, loader: Iterable[Batch], args: argparse.Namespace, *, seconds_before: float) -> None:
    """Take steps until ``--steps`` or ``--stop-after``; validate, save and report on the way and at the end."""
    last = min(args.steps, args.stop_after or args.steps)
    tokens_per_step = engine.train_batch_size() * args.context
    is_first_rank = comm.get_rank() == 0
    report = Report(args.out, enabled=is_first_rank, start=engine.global_steps, total=last, is_resumed=args.resume)
    if is_first_rank:
        # A checkpoint holds the weights, not the code of the model; sample.py builds the same one from this.
        (args.out / MODEL_FILE).write_text(json.dumps(dataclasses.asdict(engine.module.config)))
    held_out = validation_batches(args.context)
    if engine.global_steps == 0:
        report.say(f"{engine.precision_report()}\n")
        report.validation(0, validation_loss(engine, held_out))

    begin = time.monotonic() - seconds_before
    losses: list[Tensor] = []  # of the micro-batches since the last report
    told_step, told_at = engine.global_steps, time.monotonic()
    # A repeating loader begins again where the data ends.
    for x, y in ds_core.RepeatingLoader(loader):
        if engine.global_steps >= last:
            break
        loss = engine(x.to(engine.device, non_blocking=True), y.to(engine.device, non_blocking=True))
        engine.backward(loss)
        # With gradient_accumulation_steps > 1 only the last micro-batch of a window updates the model.
        is_update = engine.is_gradient_accumulation_boundary()
        engine.step()
        losses.append(loss.detach())
        if not is_update:
            continue

        step = engine.global_steps
        if step % args.log_every == 0 or step == last:
            # Reading a number makes the host wait for the device, which is why it is not done at every step.
            mean = sum_over_ranks(torch.stack(losses).mean()) / comm.get_world_size()
            speed = (step - told_step) * tokens_per_step / (time.monotonic() - told_at)
            skipped = engine.skipped_steps  # those whose gradients did not fit fp16, while its loss scale is found
            report.step(step, loss=mean, lr=engine.get_lr()[0], tokens_per_s=speed, skipped_steps=skipped)
            losses, told_step, told_at = [], step, time.monotonic()
        paused_at = time.monotonic()
        if step % args.validate_every == 0 or step == last:
            report.validation(step, validation_loss(engine, held_out))
        if step % args.save_every == 0 or step == last:
            # Every rank calls it: each writes its part. What stands in client_state comes back from load_checkpoint;
            # rank 0's is saved, and clocks differ, so the others give none.
            client_state = {"seconds": time.monotonic() - begin} if is_first_rank else None
            engine.save_checkpoint(args.out, client_state=client_state)
            report.say(f"saved step {step}")
        told_at += time.monotonic() - paused_at  # neither is training speed

    report.close()
    seconds = time.monotonic() - begin
    report.say(f"stopped at step {engine.global_steps} of {args.steps}, {seconds:.0f} s of training; see {args.out}")


def read_config(args: argparse.Namespace) -> dict[str, Any]:
    given = args.deepspeed_config
    return given if isinstance(given, dict) else json.loads(Path(given).read_text())


def with_precision(config: dict[str, Any], precision: str) -> dict[str, Any]:
    """Return ``config`` with the section of ``precision`` enabled, the others not; what else they say is kept."""
    chosen = PRECISIONS[precision]
    sections = {name: {**config.get(name, {}), "enabled": name == chosen} for name in PRECISIONS.values() if name}
    return {**config, **sections}


def with_stage(config: dict[str, Any], stage: int) -> dict[str, Any]:
    """Return ``config`` with ZeRO stage ``stage``; what else the section says is kept."""
    return {**config, "zero_optimization": {**config.get("zero_optimization", {}), "stage": stage}}


def validation_batches(context: int) -> list[Batch]:
    """Return a fixed sample of the held-out files, evenly spaced so that every part of the library is in it."""
    windows = Windows("validation", context)
    chosen = torch.linspace(0, len(windows) - 1, VALIDATION_BATCHES * VALIDATION_BATCH_SIZE).long()
    return [default_collate([windows[int(index)] for index in batch]) for batch in chosen.chunk(VALIDATION_BATCHES)]


@torch.no_grad()
def validation_loss(engine: DeepSpeedEngine, batches: list[Batch]) -> float:
    """Return the mean loss over ``batches`` in nats per byte, the same on every rank and at every number of ranks."""
    rank, world_size = comm.get_rank(), comm.get_world_size()
    total = torch.zeros((), device=engine.device)
    engine.eval()
    # Every rank runs the model equally often, as the collectives of a sharded model require. What goes beyond the end
    # of the list is a repetition that does not count.
    for number in range(rank, math.ceil(len(batches) / world_size) * world_size, world_size):
        x, y = batches[number % len(batches)]
        loss = engine(x.to(engine.device), y.to(engine.device))
        if number < len(batches):
            total += loss
    engine.train()
    return sum_over_ranks(total) / len(batches)


def sum_over_ranks(value: Tensor) -> float:
    comm.all_reduce(value)
    return value.item()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", "--config", default=str(HERE / "ds_config.json"), help="a ds_config.json")
    parser.add_argument("--precision", choices=PRECISIONS, help="instead of the configuration's")
    parser.add_argument("--zero", type=int, choices=[0, 1, 2], help="ZeRO stage, instead of the configuration's")
    parser.add_argument("--out", type=Path, default=Path("runs/gpt"), help="folder of checkpoints and history")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps in all, as the schedule has them")
    parser.add_argument("--stop-after", type=int, help="stop at this step, as if the machine had been taken away")
    parser.add_argument("--log-every", type=int, default=5, help="steps between two points of the loss curve")
    parser.add_argument("--validate-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=250, help="steps between two checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    size = parser.add_argument_group("size of the model")
    size.add_argument("--context", type=int, default=GPTConfig.context, help="bytes it can look back on")
    size.add_argument("--layers", type=int, default=GPTConfig.layers)
    size.add_argument("--heads", type=int, default=GPTConfig.heads)
    size.add_argument("--channels", type=int, default=GPTConfig.channels)
    return parser.parse_args()


if __name__ == "__main__":
    main()
