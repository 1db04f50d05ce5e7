"""Step time and peak memory of stage 0, against DistributedDataParallel with fused AdamW and the same clipping.

Both train the same GPT on the same bytes in the same processes, in turn, step by step; their losses must agree. Without
a GPU two gloo ranks of one core each are started, else one rank per GPU.

In low precision the peer is torch.autocast over fp32 weights, and DDP sends gradients in the dtype that we send them
in. With ``--dtype bf16`` and ``fp16`` ours stores the model in that dtype and keeps fp32 masters; with ``autocast``
(bf16) both have fp32 weights, which is the closest comparison.

    python benchmarks/stage0.py --model 14m
    python benchmarks/stage0.py --model 85m --dtype bf16 autocast
    python benchmarks/stage0.py --smoke --pairs 3          # a minute, says only that it runs
    python benchmarks/stage0.py --self-check               # the peer against itself: how well this machine can tell
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from _contenders import Contender, DdpLoop, DsCore, Recipe, add_dtype_argument, largest_difference
from _models import GPT_SIZES, Gpt, byte_batches
from _pairs import MIN_PAIRS, Bar, PairTimes, time_pairs
from _ranks import Ranks, default_ranks, launch, launcher_ranks, threads_per_rank
from _report import Row, add_output_arguments, exact_ratio_row, finish, ratio_row

if TYPE_CHECKING:
    from collections.abc import Callable

TIME_BAR = Bar(1.0)
MEMORY_BAR = Bar(1.05, slack=0.0, min_count=1)
"""Where both keep the same state. Masters are more of it, by choice, so their rows are for information: in a step they
take 20 bytes per parameter (weight 2, master 4, moments 8, gradient 2 and its copy 4), DDP with bucket views 16."""
# How far losses may be apart, relative. In fp32 and under autocast both compute the same in the same dtypes. In bf16
# and fp16 they cannot be bit-equal: ours also rounds the residual stream, to 8 bits in bf16 (u = 2**-8), 11 in fp16.
# Logits, of standard deviation s = 0.6, are off by about s u sqrt(2 L) after 2 L additions, independently per token, so
# the mean over T tokens by s u sqrt(2 L / T), of a loss of 5.5: 1e-4 (14m, T = 256) to 2e-4 (85m, T = 128) in bf16.
# Hundreds of draws reach 4 times that. Measured: up to 2.3e-4; at twice the learning rate 4e-4 to 6e-2 after a step.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2**-10, "fp16": 2**-13, "autocast": 1e-4}
MIB = 2**20
PEERS = {"DDP": False, "DDP bucket view": True}
"""The peer's name -> its gradient_as_bucket_view; the first is DDP as it comes."""


@dataclass(frozen=True)
class Case:
    """One row's setting, the same on every rank."""

    model: str
    dtype: str
    accumulation: int
    peer: str
    pairs: int
    warmup: int
    steps: int
    """Optimizer steps per turn."""
    micro_batch: int | None
    self_check: bool
    contender: str = ""
    """For memory: whose, ``ours`` or ``peer``."""

    @property
    def label(self) -> str:
        """What is trained, for names of rows and errors."""
        return f"{self.model}{'' if self.dtype == 'fp32' else ' ' + self.dtype}, accumulation {self.accumulation}"

    def contenders(self, ranks: Ranks) -> dict[str, Callable[[], Contender]]:
        """Return what builds ``ours`` and ``peer``: equal models, equal data; another part of the data per rank."""
        size = GPT_SIZES[self.model]
        micro_batch = self.micro_batch or (size.micro_batch if ranks.device.type == "cpu" else size.micro_batch_gpu)
        recipe = Recipe(micro_batch=micro_batch, accumulation=self.accumulation, dtype=self.dtype)
        batches = byte_batches(16, micro_batch, size.seq, seed=ranks.rank, device=ranks.device)

        def model() -> Gpt:
            torch.manual_seed(0)
            return Gpt(size).to(ranks.device)

        def peer() -> Contender:
            return DdpLoop(model(), recipe, batches, gradient_as_bucket_view=PEERS[self.peer])

        return {"ours": peer if self.self_check else lambda: DsCore(model(), recipe, batches), "peer": peer}


def time_worker(ranks: Ranks, case: Case) -> dict[str, Any]:
    """Return the seconds of each turn, and how far the losses are apart."""
    build = case.contenders(ranks)
    ours, peer = build["ours"](), build["peer"]()

    def turn(contender: Contender) -> None:
        for _ in range(case.steps):
            contender.step()

    times = time_pairs(lambda: turn(ours), lambda: turn(peer), pairs=case.pairs, warmup=case.warmup, ranks=ranks)
    difference = ranks.slowest(largest_difference(ours, peer))
    ours.close()
    peer.close()
    return {"ours": times.ours, "peer": times.peer, "loss_difference": difference}


def memory_worker(ranks: Ranks, case: Case) -> dict[str, Any]:
    """Return the peak bytes of one contender in its own processes: from before the model to after the third step."""
    build = case.contenders(ranks)[case.contender]
    gc.collect()  # under a launcher the process has run other cases
    # Three steps: DDP builds its buckets anew in the second, and the optimizer's state exists from the first.
    steps = 3
    if ranks.device.type != "cpu":
        torch.cuda.reset_peak_memory_stats(ranks.device)
        contender = build()
        for _ in range(steps):
            contender.step()
        torch.accelerator.synchronize(ranks.device)
        peak = torch.cuda.max_memory_allocated(ranks.device)
    else:
        from ds_core.testing.memory import LiveStorage

        with LiveStorage() as live:
            contender = build()
            # DDP's C++ makes its buckets through the dispatcher; were they missed, its peak would look smaller.
            if isinstance(contender, DdpLoop) and live.live_bytes < 2 * contender.parameter_bytes:
                raise RuntimeError(f"only {live.live_bytes} bytes counted: DDP's buckets are not among them")
            for _ in range(steps):
                contender.step()
            peak = live.peak_bytes
    contender.close()
    return {"peak_bytes": ranks.slowest(peak)}


def time_row(case: Case, ranks: int) -> Row | None:
    answer = launch(time_worker, case, ranks=ranks)
    if answer is None:
        return None
    allowed = LOSS_TOLERANCE[case.dtype]
    if not answer["loss_difference"] <= allowed:
        raise SystemExit(
            f"{case.label}, {case.peer}: the losses differ by {answer['loss_difference']:.2g} (relative; allowed "
            f"{allowed:.2g}), so the two do not do the same work"
        )
    name = f"step time, {case.label}, vs {case.peer}"
    return ratio_row(name, PairTimes(answer["ours"], answer["peer"]), TIME_BAR)


@cache
def peak_mib(case: Case, ranks: int) -> float | None:
    """Return the peak of ``case.contender``; None on the other ranks of a launcher."""
    answer = launch(memory_worker, case, ranks=ranks)
    return None if answer is None else answer["peak_bytes"] / MIB


def memory_row(case: Case, ranks: int) -> Row | None:
    # Ours is the same whatever the peer, so it is measured once.
    any_peer = case if case.self_check else replace(case, peer=next(iter(PEERS)))
    ours = peak_mib(replace(any_peer, contender="ours"), ranks)
    peer = peak_mib(replace(case, contender="peer"), ranks)
    if ours is None or peer is None:
        return None
    bar = MEMORY_BAR if case.dtype in ("fp32", "autocast") else None
    return exact_ratio_row(f"peak memory, {case.label}, vs {case.peer}", ours, peer, bar, unit="MiB")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["14m", "85m", "all"], default="all", help="GPT of so many parameters")
    add_dtype_argument(parser, ["fp32", "bf16"])
    parser.add_argument(
        "--accumulation", type=int, nargs="+", default=[1, 4], metavar="N", help="micro-batches per step"
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=MIN_PAIRS,
        metavar="N",
        help=f"timed pairs per row (default {MIN_PAIRS}, the fewest that give a verdict)",
    )
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="turns of each before the first timed one")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="optimizer steps per turn")
    parser.add_argument(
        "--micro-batch", type=int, metavar="N", help="samples per rank and micro-batch (default: by model and device)"
    )
    parser.add_argument("--ranks", type=int, default=None, metavar="N", help="processes (default: one per GPU, else 2)")
    parser.add_argument("--peer", choices=list(PEERS), nargs="+", default=list(PEERS), help="which DDP (default: both)")
    parser.add_argument("--only", choices=["time", "memory"], help="half of the rows")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: shows that the script runs, not how fast")
    parser.add_argument(
        "--self-check", action="store_true", help="the peer in our place: every ratio should be about 1"
    )
    add_output_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    models = ["tiny"] if arguments.smoke else ["14m", "85m"] if arguments.model == "all" else [arguments.model]
    ranks = launcher_ranks() or arguments.ranks or default_ranks()
    rows: list[Row | None] = []
    chosen = product(models, arguments.dtype, arguments.accumulation, arguments.peer)
    for model, dtype, accumulation, peer in chosen:
        case = Case(
            model=model,
            dtype=dtype,
            accumulation=accumulation,
            peer=peer,
            pairs=arguments.pairs,
            warmup=arguments.warmup,
            steps=arguments.steps,
            micro_batch=arguments.micro_batch,
            self_check=arguments.self_check,
        )
        if arguments.only != "memory":
            rows.append(time_row(case, ranks))
        if arguments.only != "time":
            rows.append(memory_row(case, ranks))
    found = [row for row in rows if row]
    if not found:  # not rank 0 of a launcher
        return 0
    settings = {
        "models": models,
        "ranks": ranks,
        "threads_per_rank": threads_per_rank(ranks),
        "dtypes": arguments.dtype,
        "steps_per_turn": arguments.steps,
        "self_check": arguments.self_check,
    }
    return finish("stage 0 against DDP", found, settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
