"""What the engine adds to each micro-step or step, in microseconds, over a hand-written loop with the same features.

The model is three linear layers 64 wide at batch 8, so small that the runtime is most of the time. Both loops do
accumulation, clipping, fused AdamW, a warm-up of the learning rate and zero_grad; with several ranks the hand-written
one is around DistributedDataParallel. In bf16 and fp16 both store the model in that dtype, cast the batch, update fp32
masters and copy them back; in fp16 the hand-written one uses torch's GradScaler. A micro-step is forward, backward and
its share of the update.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --smoke --pairs 3        # seconds, says only that it runs
    python benchmarks/overhead.py --profile                # where our time goes
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from _contenders import Contender, DdpLoop, DsCore, PlainLoop, Recipe, add_dtype_argument, largest_difference
from _models import Mlp
from _pairs import MIN_PAIRS, Bar, PairTimes, time_pairs
from _ranks import Ranks, default_ranks, launch, launcher_ranks
from _report import Row, add_output_arguments, difference_row, finish

if TYPE_CHECKING:
    from collections.abc import Callable

# Differences: the rule's slack of 0.05 is one of ratios.
MICRO_STEP_BAR_US = Bar(60.0, slack=0.0)
"""In fp32."""
STEP_BAR_US = Bar(80.0, slack=0.0)
"""In low precision: of a whole step, however many micro-steps it has."""
WIDTH, BATCH = 64, 8
# In bf16 and fp16 the loss has that dtype, of 8 and 11 bits. On a CPU both loops were bit-equal for a thousand steps;
# where sums run in another order a rounding may go the other way, which moves the loss by one spacing of its numbers.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2**-7, "fp16": 2**-10, "autocast": 1e-4}
COMPARED_LOSSES = 400
"""Later losses are near the noise floor of fitting random targets, where relative differences say nothing."""


@dataclass(frozen=True)
class Case:
    """One row's setting, the same on every rank."""

    dtype: str
    accumulation: int
    pairs: int
    warmup: int
    micro_steps: int
    """Per turn; a multiple of the accumulation is run."""
    self_check: bool
    cpu_time: bool

    @property
    def steps(self) -> int:
        return max(1, self.micro_steps // self.accumulation)

    def contenders(self, ranks: Ranks) -> dict[str, Callable[[], Contender]]:
        """Return what builds ``ours`` and ``peer``: equal models and data."""
        recipe = Recipe(micro_batch=BATCH, accumulation=self.accumulation, lr=1e-3, warmup_steps=100, dtype=self.dtype)
        generator = torch.Generator().manual_seed(ranks.rank)
        data = torch.randn(64, 2, BATCH, WIDTH, generator=generator).to(ranks.device)
        batches = [(inputs, targets) for inputs, targets in data]

        def model() -> Mlp:
            torch.manual_seed(0)
            return Mlp(WIDTH).to(ranks.device)

        def peer() -> Contender:
            masters = self.dtype in ("bf16", "fp16")
            if ranks.world_size == 1:
                return PlainLoop(model(), recipe, batches, masters=masters)
            return DdpLoop(model(), recipe, batches, masters=masters, gradient_as_bucket_view=True)

        return {"ours": peer if self.self_check else lambda: DsCore(model(), recipe, batches), "peer": peer}


def run_steps(contender: Contender, steps: int) -> None:
    for _ in range(steps):
        contender.step()


def time_worker(ranks: Ranks, case: Case) -> dict[str, Any]:
    """Return the seconds of each turn, and how far the first losses are apart."""
    build = case.contenders(ranks)
    ours, peer = build["ours"](), build["peer"]()
    times = time_pairs(
        lambda: run_steps(ours, case.steps),
        lambda: run_steps(peer, case.steps),
        pairs=case.pairs,
        warmup=case.warmup,
        ranks=ranks,
        clock=time.process_time if case.cpu_time else time.perf_counter,
    )
    difference = ranks.slowest(largest_difference(ours, peer, first=COMPARED_LOSSES))
    ours.close()
    peer.close()
    return {"ours": times.ours, "peer": times.peer, "loss_difference": difference}


def profile_worker(ranks: Ranks, case: Case) -> str:
    """Return cProfile's table of one turn of ours, by time spent in the function itself."""
    import cProfile
    import io
    import pstats

    ours = case.contenders(ranks)["ours"]()
    run_steps(ours, case.steps)
    profile = cProfile.Profile()
    profile.runcall(run_steps, ours, case.steps)
    ours.close()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(25)
    return text.getvalue()


def overhead_row(case: Case, ranks: int) -> Row | None:
    answer = launch(time_worker, case, ranks=ranks, threads=1)
    if answer is None:
        return None
    allowed = LOSS_TOLERANCE[case.dtype]
    if not answer["loss_difference"] <= allowed:
        raise SystemExit(
            f"{case.dtype}, accumulation {case.accumulation}, {ranks} ranks: the losses differ by "
            f"{answer['loss_difference']:.2g} (relative; allowed {allowed:.2g}), so the two do not do the same work"
        )
    peer = "plain loop" if ranks == 1 else "DDP loop"
    what, bar, count = ("per micro-step", MICRO_STEP_BAR_US, case.steps * case.accumulation)
    if case.dtype != "fp32":
        what, bar, count = (f"per step, {case.dtype}", STEP_BAR_US, case.steps)
    return difference_row(
        f"{what}, {ranks} rank{'s' * (ranks > 1)}, accumulation {case.accumulation}, vs {peer}",
        PairTimes(answer["ours"], answer["peer"]),
        bar,
        scale=1e6 / count,
        unit="us",
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_dtype_argument(parser, ["fp32", "bf16", "fp16"])
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
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="turns of each before the first timed one")
    parser.add_argument("--micro-steps", type=int, default=300, metavar="N", help="per turn (default 300)")
    parser.add_argument(
        "--ranks", type=int, nargs="+", metavar="N", help="processes, one row each (default: 1, and one per GPU or 2)"
    )
    parser.add_argument("--smoke", action="store_true", help="short turns: shows that the script runs, not how fast")
    parser.add_argument("--self-check", action="store_true", help="the peer in our place: differences should be near 0")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU time of the process: for a busy machine; the bar speaks of wall time",
    )
    parser.add_argument(
        "--profile", action="store_true", help="print where our time goes on one rank, and nothing else"
    )
    add_output_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    micro_steps = 20 if arguments.smoke else arguments.micro_steps
    cases = [
        Case(
            dtype,
            accumulation,
            arguments.pairs,
            arguments.warmup,
            micro_steps,
            arguments.self_check,
            arguments.cpu_time,
        )
        for dtype in arguments.dtype
        for accumulation in arguments.accumulation
    ]
    if arguments.profile:
        for case in cases:
            table = launch(profile_worker, case, ranks=1, threads=1)
            if table is not None:
                micro_steps = case.steps * case.accumulation
                print(f"{case.dtype}, accumulation {case.accumulation}, {micro_steps} micro-steps\n{table}")
        return 0
    launched = launcher_ranks()
    worlds = [launched] if launched else arguments.ranks or sorted({1, default_ranks()})
    rows = [overhead_row(case, ranks) for ranks in worlds for case in cases]
    found = [row for row in rows if row]
    if not found:  # not rank 0 of a launcher
        return 0
    settings = {
        "dtypes": arguments.dtype,
        "ranks": worlds,
        "threads_per_rank": 1,
        "micro_steps_per_turn": micro_steps,
        "self_check": arguments.self_check,
        "cpu_time": arguments.cpu_time,
    }
    return finish("engine overhead over a hand-written loop", found, settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
