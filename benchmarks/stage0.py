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
    python benchmarks/stage0.py --model 14m --profile      # where the time goes
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from _contenders import DdpLoop, DsCore
from _pairs import Bar
from _report import Row, exact_ratio_row, finish
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
    from _steps import Build

TIME_BAR = Bar(1.0)
MEMORY_BAR = Bar(1.05, slack=0.0, min_count=1)
"""Where both keep the same state. Masters are more of it, by choice, so their rows are for information: in a step they
take 20 bytes per parameter (weight 2, master 4, moments 8, gradient 2 and its copy 4), DDP with bucket views 16."""
PEERS = {
    "DDP": partial(DdpLoop, gradient_as_bucket_view=False),
    "DDP bucket view": partial(DdpLoop, gradient_as_bucket_view=True),
}
"""The first is DDP as it comes."""


def memory_row(setting: Setting, name: str, ours: Build, peer: Build, ranks: int) -> Row | None:
    # Ours is the same whatever the peer, and is measured once.
    our_memory, peer_memory = memory(setting, ours, ranks), memory(setting, peer, ranks)
    if our_memory is None or peer_memory is None:
        return None
    bar = MEMORY_BAR if setting.dtype in ("fp32", "autocast") else None
    return exact_ratio_row(name, our_memory.peak / MIB, peer_memory.peak / MIB, bar, unit="MiB")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_arguments(parser)
    parser.add_argument("--peer", choices=list(PEERS), nargs="+", default=list(PEERS), help="which DDP (default: both)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    ranks = chosen_ranks(arguments)
    rows: list[Row | None] = []
    for model, dtype, accumulation in product(chosen_models(arguments), arguments.dtype, arguments.accumulation):
        setting = Setting(model, dtype, accumulation, arguments.micro_batch)
        if arguments.profile:
            for name, build in {"ours": DsCore, **{peer: PEERS[peer] for peer in arguments.peer}}.items():
                print(f"{name}, {setting.label}\n{profile_table(setting, build, arguments)}")
            continue
        for name in arguments.peer:
            peer = PEERS[name]
            ours = peer if arguments.self_check else DsCore
            if arguments.only != "memory":
                rows.append(
                    time_row(f"step time, {setting.label}, vs {name}", setting, ours, peer, TIME_BAR, arguments)
                )
            if arguments.only != "time":
                rows.append(memory_row(setting, f"peak memory, {setting.label}, vs {name}", ours, peer, ranks))
    found = [row for row in rows if row]
    if not found:  # not rank 0 of a launcher, or profiles
        return 0
    return finish("stage 0 against DDP", found, settings_of_run(arguments), arguments)


if __name__ == "__main__":
    sys.exit(main())
