"""Step time and memory of activation checkpointing by configuration, against torch.utils.checkpoint put in by hand.

Both are our engine on the same GPT and the same bytes, in the same processes, in turn; their losses must agree. In the
peer every block's forward is wrapped in ``torch.utils.checkpoint.checkpoint(use_reentrant=False)``, or not wrapped
(``none``); in ours the section ``activation_checkpointing`` does it. Without a GPU one rank is started, else one per
GPU. ``full`` against torch's has bars, the rest is for information. Memory has two rows: the peak of everything, and
what a forward leaves for backward.

``auto`` may save half-way between what ``full`` and what ``none`` do; the step that it measures is not timed.
``offloaded`` keeps the inputs of blocks on the host, and moves nothing where there is no other device.
``partitioned`` keeps a slice of them on each rank of one model-parallel group, which are all ranks. They read the same
data, and the peer in that row does so too. It needs two: without a GPU it starts them whatever the others do, of half
of the cores each; on one GPU it is left out.

    python benchmarks/activation.py --model 14m
    python benchmarks/activation.py --policy full auto partitioned --dtype bf16 --micro-batch 8
    python benchmarks/activation.py --smoke --pairs 3                      # a minute, says only that it runs
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from _contenders import DsCore
from _pairs import Bar
from _ranks import CPU_RANKS, launcher_ranks, threads_per_rank
from _report import Row, exact_ratio_row, finish
from _steps import (
    MIB,
    Setting,
    add_step_arguments,
    chosen_models,
    memory,
    profile_table,
    settings_of_run,
    time_row,
)
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from _contenders import Recipe
    from _steps import Build
    from torch import Tensor, nn

PARTITIONED = "partitioned"
SECTIONS: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "every_n": {"policy": "every_n", "interval": 2},
    "selective": {"policy": "selective"},
    "auto": {"policy": "auto"},
    "offloaded": {"policy": "full", "cpu_checkpointing": True},
    PARTITIONED: {"policy": "full", "partition_activations": True},
}
"""What ours is asked for; ``auto`` gets its budget once the model is there."""
TORCH, NONE = "torch.utils.checkpoint", "none"
BAR, MEMORY_BAR = Bar(1.02), Bar(1.0, slack=0.0, min_count=1)
"""Of ``full`` against torch's; the rest is for information."""


def by_hand(model: nn.Module) -> None:
    """Wrap every block as a person would."""
    for block in model.blocks:  # type: ignore[union-attr]  # a ModuleList
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


PEERS: dict[str, Build] = {TORCH: partial(DsCore, prepare=by_hand), NONE: DsCore}


class OneGroup:
    """An mpu: all ranks are one model-parallel group."""

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD


class Configured(DsCore):
    """Ours, with a section ``activation_checkpointing`` and what that needs besides."""

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        batches: Sequence[tuple[Tensor, Tensor]],
        *,
        activation: Mapping[str, Any],
    ) -> None:
        section = dict(activation)
        if section["policy"] == "auto":
            section["memory_budget"] = budget_of_auto(module, recipe, batches[0])
        self._is_divided = section.get("partition_activations", False)
        if self._is_divided:
            from ds_core import checkpointing

            # Of the process, but the peer's blocks call torch, and so do not ask.
            checkpointing.configure(OneGroup())
        super().__init__(module, recipe, batches, activation=section)

    def close(self) -> None:
        super().close()
        if self._is_divided:
            from ds_activation.settings import forget
            from ds_core import checkpointing

            checkpointing.reset()
            forget()  # under a launcher the process runs further cases


def budget_of_auto(module: nn.Module, recipe: Recipe, batch: tuple[Tensor, Tensor]) -> int:
    """Return the bytes half-way between what recomputing every block of ``module`` saves, and what keeping all does."""
    from ds_activation.blocks import find_blocks
    from ds_activation.choice import Decision, predict
    from ds_activation.profile import profile

    model = deepcopy(module)  # the engine makes its masters of the weights as they are
    precision: Any = nullcontext()
    if recipe.dtype == "autocast":
        precision = torch.autocast(batch[0].device.type, dtype=recipe.compute)
    elif recipe.compute is not None:
        model.to(recipe.compute)
    with precision:
        found = profile(model, batch, {}, find_blocks(model, ()))
    decisions = (Decision.RECOMPUTE, Decision.KEEP)
    return sum(predict(found, (decision,) * len(found.blocks)).peak_bytes for decision in decisions) // 2


def can_divide() -> bool:
    """Return whether there can be two ranks."""
    return (launcher_ranks() or torch.cuda.device_count() or CPU_RANKS) > 1


def ranks_of(policy: str, asked: int | None) -> int:
    """Return the number of ranks that a policy and its peer run on."""
    launched = launcher_ranks()
    if launched is not None:
        return launched
    ranks = asked or torch.cuda.device_count() or 1
    return max(ranks, 2) if policy == PARTITIONED else ranks


def memory_rows(setting: Setting, names: str, ours: Build, peer: Build, bar: Bar | None, ranks: int) -> Iterator[Row]:
    """Give the peak, which the bar is for, and what a forward leaves. Of each contender both are measured once."""
    our_memory, peer_memory = memory(setting, ours, ranks), memory(setting, peer, ranks)
    if our_memory is not None and peer_memory is not None:
        yield exact_ratio_row(f"peak memory, {names}", our_memory.peak / MIB, peer_memory.peak / MIB, bar, unit="MiB")
        left, peer_left = our_memory.for_backward / MIB, peer_memory.for_backward / MIB
        yield exact_ratio_row(f"left for backward, {names}", left, peer_left, None, unit="MiB")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_arguments(parser)
    parser.set_defaults(accumulation=[1], dtype=["fp32"])
    parser.add_argument(
        "--policy", choices=list(SECTIONS), nargs="+", help="what ours does (default: all, with --smoke the first)"
    )
    parser.add_argument("--peer", choices=list(PEERS), nargs="+", default=[TORCH], help=f"default: {TORCH}")
    arguments = parser.parse_args(argv)
    # The first forward of auto is measured, which takes several times as long.
    arguments.warmup = max(1, arguments.warmup)
    if arguments.policy is None:
        here = [policy for policy in SECTIONS if policy != PARTITIONED or can_divide()]
        arguments.policy = here[: 1 if arguments.smoke else None]
    elif PARTITIONED in arguments.policy and not can_divide():
        parser.error(f"--policy {PARTITIONED} divides over two ranks or more, and here is one GPU or one rank")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    # Made once: what memory was measured of is known by its identity.
    builds = {policy: partial(Configured, activation=SECTIONS[policy]) for policy in arguments.policy}
    ranks = {policy: ranks_of(policy, arguments.ranks) for policy in arguments.policy}
    rows: list[Row | None] = []
    chosen = product(
        chosen_models(arguments), arguments.dtype, arguments.accumulation, arguments.policy, arguments.peer
    )
    for model, dtype, accumulation, policy, name in chosen:
        setting = Setting(model, dtype, accumulation, arguments.micro_batch, is_same_data=policy == PARTITIONED)
        peer = PEERS[name]
        ours = peer if arguments.self_check else builds[policy]
        of_row = argparse.Namespace(**{**vars(arguments), "ranks": ranks[policy]})
        if arguments.profile:
            for who, build in ((policy, ours), (name, peer)):
                print(f"{who}, {setting.label}\n{profile_table(setting, build, of_row)}", flush=True)
            continue
        is_judged = policy == "full" and name == TORCH
        names = f"{policy}, {setting.label}, {ranks[policy]} rank{'s' * (ranks[policy] > 1)}, vs {name}"
        if arguments.only != "memory":
            rows.append(time_row(f"step time, {names}", setting, ours, peer, BAR if is_judged else None, of_row))
        if arguments.only != "time":
            rows.extend(memory_rows(setting, names, ours, peer, MEMORY_BAR if is_judged else None, ranks[policy]))
    found = [row for row in rows if row]
    if not found:  # not rank 0 of a launcher, or profiles
        return 0
    settings = {
        **settings_of_run(arguments),
        "policies": arguments.policy,
        "ranks": ranks,
        "threads_per_rank": {policy: threads_per_rank(count) for policy, count in ranks.items()},
    }
    return finish("Activation checkpointing by configuration against its peers", found, settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
