"""Step time and memory of ZeRO stages 1 and 2, against DistributedDataParallel and, where installed, DeepSpeed.

All train the same GPT on the same bytes with fused AdamW and the same clipping, in the same processes, in turn, step by
step; their losses must agree. Without a GPU two gloo ranks of one core each are started, else one rank per GPU.

DDP has the same dtypes: with ``--dtype bf16`` and ``fp16`` both store the model and send gradients in that dtype and
update fp32 masters, of which DDP has all and ours its share. DeepSpeed runs the same stage with its defaults.
Asked for by ``--peer``, for information: ``DDP in every backward`` reduces as often as stage 2 does where gradients are
accumulated, which is what stage 2 pays for its memory; ``fully_shard`` stores fp32 shards, and computes in bf16.

    python benchmarks/zero.py --model 14m
    python benchmarks/zero.py --model 85m --dtype bf16 --stage 2 --peer DDP fully_shard
    python benchmarks/zero.py --smoke --pairs 3                            # a minute, says only that it runs
    python benchmarks/zero.py --self-check                                 # the peer against itself
    python benchmarks/zero.py --model 14m --accumulation 1 --profile       # where the time goes, of each
    python benchmarks/zero.py --zero '{"reduce_bucket_size": 4000000}'     # further keys of zero_optimization
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from _contenders import DdpLoop, DsCore
from _pairs import Bar
from _report import Row, exact_ratio_row, finish
from _sharded import DeepSpeed, FullyShard, has_deepspeed
from _steps import (
    MIB,
    Setting,
    add_step_arguments,
    chosen_models,
    chosen_ranks,
    memory,
    profile_table,
    settings_of_run,
    time_row,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _steps import Build

STAGES = (1, 2)
EVERY_BACKWARD = "DDP in every backward"
BARS = {
    "DDP": Bar(1.0),
    "DDP bucket view": Bar(1.0),
    EVERY_BACKWARD: None,
    "DeepSpeed": Bar(0.9),
    "fully_shard": None,
}
"""What the ratio of step times to each peer may be; None: for information. Memory is for information: what a rank must
hold by the formulas is asserted in the tests."""
DDP = {
    (name, masters): partial(
        DdpLoop,
        gradient_as_bucket_view=name == "DDP bucket view",
        masters=masters,
        every_backward=name == EVERY_BACKWARD,
    )
    for name in ("DDP", "DDP bucket view", EVERY_BACKWARD)
    for masters in (False, True)
}
DEEPSPEED = {stage: partial(DeepSpeed, stage=stage) for stage in STAGES}


def build_peer(name: str, stage: int, dtype: str) -> Build:
    if name == "DeepSpeed":
        return DEEPSPEED[stage]
    return FullyShard if name == "fully_shard" else DDP[name, dtype in ("bf16", "fp16")]


def memory_rows(setting: Setting, names: str, ours: Build, peer: Build, ranks: int) -> Iterator[Row | None]:
    """Give the peak, and what stays from step to step. Of each contender both are measured once."""
    our_memory, peer_memory = memory(setting, ours, ranks), memory(setting, peer, ranks)
    if our_memory is not None and peer_memory is not None:
        yield exact_ratio_row(f"peak memory, {names}", our_memory.peak / MIB, peer_memory.peak / MIB, None, unit="MiB")
        yield exact_ratio_row(f"kept memory, {names}", our_memory.kept / MIB, peer_memory.kept / MIB, None, unit="MiB")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_arguments(parser)
    default = ["DDP", "DeepSpeed"] if has_deepspeed() else ["DDP"]
    parser.add_argument("--stage", type=int, choices=STAGES, nargs="+", default=list(STAGES), help="default: both")
    parser.add_argument(
        "--peer", choices=list(BARS), nargs="+", default=default, help="default: DDP, and DeepSpeed where installed"
    )
    parser.add_argument(
        "--zero", type=json.loads, default={}, metavar="JSON", help="further keys of our zero_optimization"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    ranks = chosen_ranks(arguments)
    # Made once: what memory was measured of is known by its identity.
    stages = {stage: partial(DsCore, zero={**arguments.zero, "stage": stage}) for stage in arguments.stage}
    rows: list[Row | None] = []
    profiled: list[tuple[Setting, Build]] = []
    chosen = product(chosen_models(arguments), arguments.dtype, arguments.accumulation, arguments.stage, arguments.peer)
    for model, dtype, accumulation, stage, name in chosen:
        setting = Setting(model, dtype, accumulation, arguments.micro_batch)
        peer = build_peer(name, stage, dtype)
        ours = peer if arguments.self_check else stages[stage]
        if arguments.profile:
            for who, build in ((f"stage {stage}", ours), (name, peer)):
                if (setting, build) not in profiled:
                    profiled.append((setting, build))
                    print(f"{who}, {setting.label}\n{profile_table(setting, build, arguments)}", flush=True)
            continue
        names = f"stage {stage}, {setting.label}, vs {name}"
        if arguments.only != "memory":
            rows.append(time_row(f"step time, {names}", setting, ours, peer, BARS[name], arguments))
        if arguments.only != "time":
            rows.extend(memory_rows(setting, names, ours, peer, ranks))
    found = [row for row in rows if row]
    if not found:  # not rank 0 of a launcher, or profiles
        return 0
    settings = {**settings_of_run(arguments), "stages": arguments.stage, "zero": arguments.zero}
    return finish("ZeRO stages 1 and 2 against their peers", found, settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
