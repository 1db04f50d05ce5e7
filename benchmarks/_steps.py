"""What the benchmarks of training steps share: what is trained, a turn of each contender, peak memory, a profile.

Two contenders train the same GPT on the same bytes in the same processes, in turn, step by step; their losses must
agree. Memory is counted of one contender at a time, in processes of its own.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from _contenders import Contender, DdpLoop, Recipe, add_dtype_argument, largest_difference
from _models import GPT_SIZES, Gpt, byte_batches
from _pairs import MIN_PAIRS, Bar, PairTimes, time_pairs
from _ranks import Ranks, default_ranks, launch, launcher_ranks, threads_per_rank
from _report import Row, add_output_arguments, ratio_row
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    Build = Callable[[Gpt, Recipe, Sequence[tuple[Tensor, Tensor]]], Contender]
    """Makes a contender of a model; a function or partial of one of a module's top level, so that ranks can have it."""

__all__ = [
    "MIB",
    "Memory",
    "Setting",
    "add_step_arguments",
    "chosen_models",
    "chosen_ranks",
    "memory",
    "profile_table",
    "settings_of_run",
    "time_row",
]

# How far losses may be apart, relative. In fp32 and under autocast both compute the same in the same dtypes. In bf16
# and fp16 they cannot be bit-equal: ours also rounds the residual stream, to 8 bits in bf16 (u = 2**-8), 11 in fp16.
# Logits, of standard deviation s = 0.6, are off by about s u sqrt(2 L) after 2 L additions, independently per token, so
# the mean over T tokens by s u sqrt(2 L / T), of a loss of 5.5: 1e-4 (14m, T = 256) to 2e-4 (85m, T = 128) in bf16.
# Hundreds of draws reach 4 times that. Measured: up to 2.3e-4; at twice the learning rate 4e-4 to 6e-2 after a step.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2**-10, "fp16": 2**-13, "autocast": 1e-4}
MIB = 2**20
MEMORY_STEPS = 3
"""DDP builds its buckets anew in the second step, and the optimizer's state exists from the first."""


@dataclass(frozen=True)
class Setting:
    """What is trained, the same on every rank."""

    model: str
    dtype: str
    accumulation: int
    micro_batch: int | None = None
    """None: by model and device."""
    is_same_data: bool = False
    """Whether all ranks read the same, as those of a model-parallel group do."""

    @property
    def label(self) -> str:
        """What is trained, for names of rows and errors."""
        return f"{self.model}{'' if self.dtype == 'fp32' else ' ' + self.dtype}, accumulation {self.accumulation}"

    def starter(self, ranks: Ranks) -> Callable[[Build], Contender]:
        """Return what starts a contender: equal models, equal data; another part per rank, unless it is the same."""
        size = GPT_SIZES[self.model]
        micro_batch = self.micro_batch or (size.micro_batch if ranks.device.type == "cpu" else size.micro_batch_gpu)
        recipe = Recipe(micro_batch=micro_batch, accumulation=self.accumulation, dtype=self.dtype)
        seed = 0 if self.is_same_data else ranks.rank
        batches = byte_batches(16, micro_batch, size.seq, seed=seed, device=ranks.device)

        def start(build: Build) -> Contender:
            torch.manual_seed(0)
            model = Gpt(size).to(ranks.device)
            if self.dtype in ("bf16", "fp16"):
                # DeepSpeed makes its masters of weights that it has rounded, we of those given. From weights that are
                # rounded already it is the same; else losses stray by up to 1e-3, as our own from either start do.
                model = model.to(recipe.compute).float()
            return build(model, recipe, batches)

        return start


@dataclass(frozen=True)
class _Timing:
    setting: Setting
    ours: Build
    peer: Build
    pairs: int
    warmup: int
    steps: int


def _time_worker(ranks: Ranks, timing: _Timing) -> dict[str, Any]:
    """Return the seconds of each turn, and how far the losses are apart."""
    start = timing.setting.starter(ranks)
    ours, peer = start(timing.ours), start(timing.peer)

    def turn(contender: Contender) -> None:
        for _ in range(timing.steps):
            contender.step()

    times = time_pairs(lambda: turn(ours), lambda: turn(peer), pairs=timing.pairs, warmup=timing.warmup, ranks=ranks)
    difference = ranks.slowest(largest_difference(ours, peer))
    ours.close()
    peer.close()
    return {"ours": times.ours, "peer": times.peer, "loss_difference": difference}


def time_row(
    name: str, setting: Setting, ours: Build, peer: Build, bar: Bar | None, arguments: argparse.Namespace
) -> Row | None:
    """Return the row of step times, ours / peer; None on the other ranks of a launcher.

    Args:
        name: of the row.
        setting: what both train.
        ours: one of the two.
        peer: the other.
        bar: for the ratio; None: for information.
        arguments: of :func:`add_step_arguments`.

    Raises:
        SystemExit: the losses differ, so the two do not do the same work.
    """
    timing = _Timing(setting, ours, peer, arguments.pairs, arguments.warmup, arguments.steps)
    answer = launch(_time_worker, timing, ranks=chosen_ranks(arguments))
    if answer is None:
        return None
    allowed = LOSS_TOLERANCE[setting.dtype]
    if not answer["loss_difference"] <= allowed:
        raise SystemExit(
            f"{name}: the losses differ by {answer['loss_difference']:.2g} (relative; allowed {allowed:.2g}), so the "
            "two do not do the same work"
        )
    return ratio_row(name, PairTimes(answer["ours"], answer["peer"]), bar)


@dataclass(frozen=True)
class Memory:
    """Bytes of one contender on the rank that has most, without the batches."""

    peak: float
    """From before the model to after the third step."""
    kept: float
    """After the third step: weights, masters, optimizer state, and what else stays from one step to the next."""
    for_backward: float
    """What the last forward left behind for its backward, the loss included: saved activations."""


class _Forwards:
    """Bytes that the last forward of the model left for its backward; it is watched while this is entered."""

    def __init__(self, live_bytes: Callable[[], int]) -> None:
        self.left = self._before = 0
        self._live_bytes = live_bytes
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> _Forwards:
        # Of all modules, since which one the contender calls is its own matter.
        self._hooks = [register_module_forward_pre_hook(self._begin), register_module_forward_hook(self._end)]
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, inputs: object) -> None:
        if isinstance(module, Gpt):
            self._before = self._live_bytes()

    def _end(self, module: nn.Module, inputs: object, loss: Tensor) -> None:
        if isinstance(module, Gpt):
            loss.register_hook(self._backward_begins)  # autocast around the forward still has its casts here

    def _backward_begins(self, gradient: Tensor) -> None:
        self.left = self._live_bytes() - self._before


def _memory_worker(ranks: Ranks, case: tuple[Setting, Build]) -> dict[str, Any]:
    setting, build = case
    start = setting.starter(ranks)
    gc.collect()  # under a launcher the process has run other cases
    if ranks.device.type != "cpu":
        before = torch.cuda.memory_allocated(ranks.device)
        torch.cuda.reset_peak_memory_stats(ranks.device)
        contender = start(build)
        with _Forwards(lambda: torch.cuda.memory_allocated(ranks.device)) as forwards:
            for _ in range(MEMORY_STEPS):
                contender.step()
        torch.accelerator.synchronize(ranks.device)
        peak = torch.cuda.max_memory_allocated(ranks.device)
        kept = torch.cuda.memory_allocated(ranks.device) - before
    else:
        from ds_core.testing.memory import LiveStorage

        with LiveStorage() as live:
            contender = start(build)
            # DDP's C++ makes its buckets through the dispatcher; were they missed, its peak would look smaller.
            if isinstance(contender, DdpLoop) and live.live_bytes < 2 * contender.parameter_bytes:
                raise RuntimeError(f"only {live.live_bytes} bytes counted: DDP's buckets are not among them")
            with _Forwards(lambda: live.live_bytes) as forwards:
                for _ in range(MEMORY_STEPS):
                    contender.step()
            peak, kept = live.peak_bytes, live.live_bytes
    contender.close()
    found = {"peak": peak, "kept": kept, "for_backward": forwards.left}
    return {name: ranks.slowest(nbytes) for name, nbytes in found.items()}


@cache
def memory(setting: Setting, build: Build, ranks: int) -> Memory | None:
    """Return what a contender holds in processes of its own; None on the other ranks of a launcher."""
    answer = launch(_memory_worker, (setting, build), ranks=ranks)
    return None if answer is None else Memory(**answer)


def _profile_worker(ranks: Ranks, case: tuple[Setting, Build, int]) -> str:
    setting, build, steps = case
    contender = setting.starter(ranks)(build)
    for _ in range(MEMORY_STEPS):
        contender.step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if ranks.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    ranks.align()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            contender.step()
        ranks.finish()
    contender.close()
    by = "self_cuda_time_total" if ranks.device.type == "cuda" else "self_cpu_time_total"
    return str(profile.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=60))


def profile_table(setting: Setting, build: Build, arguments: argparse.Namespace) -> str | None:
    """Return where rank 0's time goes in ``--steps`` steps, by op; None on the other ranks of a launcher."""
    answer = launch(_profile_worker, (setting, build, arguments.steps), ranks=chosen_ranks(arguments))
    return None if answer is None else str(answer)


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every benchmark of training steps can be asked."""
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
    parser.add_argument("--only", choices=["time", "memory"], help="half of the rows")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: shows that the script runs, not how fast")
    parser.add_argument(
        "--self-check", action="store_true", help="the peer in our place: every ratio should be about 1"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print where the time of each contender goes, and nothing else"
    )
    add_output_arguments(parser)


def chosen_models(arguments: argparse.Namespace) -> list[str]:
    return ["tiny"] if arguments.smoke else ["14m", "85m"] if arguments.model == "all" else [arguments.model]


def chosen_ranks(arguments: argparse.Namespace) -> int:
    return launcher_ranks() or arguments.ranks or default_ranks()


def settings_of_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the results depend on, for the JSON."""
    ranks = chosen_ranks(arguments)
    return {
        "models": chosen_models(arguments),
        "ranks": ranks,
        "threads_per_rank": threads_per_rank(ranks),
        "dtypes": arguments.dtype,
        "steps_per_turn": arguments.steps,
        "self_check": arguments.self_check,
    }
