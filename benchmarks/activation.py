"""Step time and memory of activation checkpointing by configuration, against torch.utils.checkpoint put in by hand.

Both are our engine on the same GPT and the same bytes, in the same processes, in turn; their losses must agree. In the
peer every block's forward is wrapped in ``torch.utils.checkpoint.checkpoint(use_reentrant=False)``, or not wrapped
(``none``); in ours the section ``activation_checkpointing`` does it. Without a GPU one rank is started, else one per
GPU.

    python benchmarks/activation.py --model 14m
    python benchmarks/activation.py --policy full selective --dtype bf16 --micro-batch 8
    python benchmarks/activation.py --smoke --pairs 3                      # a minute, says only that it runs
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from _contenders import DsCore
from _pairs import Bar
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
    from collections.abc import Iterator

    from _steps import Build
    from torch import nn

SECTIONS: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "every_n": {"policy": "every_n", "interval": 2},
    "selective": {"policy": "selective"},
    "full, inputs on the host": {"policy": "full", "cpu_checkpointing": True},
}
"""What ours is asked for. ``cpu_checkpointing`` moves nothing where there is no other device than the CPU."""
TORCH, NONE = "torch.utils.checkpoint", "none"
BAR, MEMORY_BAR = Bar(1.02), Bar(1.0, slack=0.0, min_count=1)
"""Of ``full`` against torch's; the rest is for information."""


def by_hand(model: nn.Module) -> None:
    """Wrap every block as a person would."""
    for block in model.blocks:  # type: ignore[union-attr]  # a ModuleList
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


PEERS: dict[str, Build] = {TORCH: partial(DsCore, prepare=by_hand), NONE: DsCore}


def memory_rows(setting: Setting, names: str, ours: Build, peer: Build, bar: Bar | None, ranks: int) -> Iterator[Row]:
    our_memory, peer_memory = memory(setting, ours, ranks), memory(setting, peer, ranks)
    if our_memory is not None and peer_memory is not None:
        yield exact_ratio_row(f"peak memory, {names}", our_memory.peak / MIB, peer_memory.peak / MIB, bar, unit="MiB")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_arguments(parser)
    parser.set_defaults(accumulation=[1], dtype=["fp32"])
    parser.add_argument(
        "--policy", choices=list(SECTIONS), nargs="+", help="what ours does (default: all, with --smoke the first)"
    )
    parser.add_argument("--peer", choices=list(PEERS), nargs="+", default=[TORCH], help=f"default: {TORCH}")
    arguments = parser.parse_args(argv)
    if arguments.policy is None:
        arguments.policy = list(SECTIONS)[: 1 if arguments.smoke else None]
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.ranks is None:
        import torch

        arguments.ranks = max(1, torch.cuda.device_count())
    # Made once: what memory was measured of is known by its identity.
    builds = {policy: partial(DsCore, activation=SECTIONS[policy]) for policy in arguments.policy}
    rows: list[Row | None] = []
    chosen = product(
        chosen_models(arguments), arguments.dtype, arguments.accumulation, arguments.policy, arguments.peer
    )
    for model, dtype, accumulation, policy, name in chosen:
        setting = Setting(model, dtype, accumulation, arguments.micro_batch)
        peer = PEERS[name]
        ours = peer if arguments.self_check else builds[policy]
        if arguments.profile:
            for who, build in ((policy, ours), (name, peer)):
                print(f"{who}, {setting.label}\n{profile_table(setting, build, arguments)}", flush=True)
            continue
        is_judged = policy == "full" and name == TORCH
        names = f"{policy}, {setting.label}, vs {name}"
        if arguments.only != "memory":
            rows.append(time_row(f"step time, {names}", setting, ours, peer, BAR if is_judged else None, arguments))
        if arguments.only != "time":
            rows.extend(memory_rows(setting, names, ours, peer, MEMORY_BAR if is_judged else None, arguments.ranks))
    found = [row for row in rows if row]
    if not found:  # not rank 0 of a launcher, or profiles
        return 0
    settings = {**settings_of_run(arguments), "policies": arguments.policy}
    return finish("Activation checkpointing by configuration against its peers", found, settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
