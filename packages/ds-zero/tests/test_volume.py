"""What a step moves equals what is predicted from sizes, byte for byte: each stage, accumulation, dtype and backend."""

from __future__ import annotations

import math
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_core
from ds_core import comm
from ds_core.comm import CollectiveWatch, Traffic
from ds_core.partition.arithmetic import plan_buckets
from ds_core.testing.matrix import pairwise
from ds_core.testing.ranks import run_ranks
from ds_zero import collectives
from ds_zero.layout import cut, whole
from ds_zero.volume import BucketSizes, step_traffic, table

DOC = Path(__file__).parents[3] / "docs" / "volume.md"
BUCKET_NUMEL = 300
DTYPES = ("fp32", "bf16") if find_spec("ds_fp16") else ("fp32",)
FACTORS = {
    "stage": (0, 1, 2),
    "accumulation": (1, 4),
    "dtype": DTYPES,
    "clipping": (0.0, 0.05),
    "backend": ("gloo", "nccl"),
}
CASES = pairwise(FACTORS)


def build() -> nn.Module:
    """Return a model of which hardly a size divides by 2, 3 or 4, and one bucket has more elements than its bound."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 31), nn.Tanh(), nn.Linear(31, 17), nn.Tanh(), nn.Linear(17, 1))


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": case["accumulation"],
        "gradient_clipping": case["clipping"],
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "bf16": {"enabled": case["dtype"] == "bf16"},
        "zero_optimization": {"stage": case["stage"], "reduce_bucket_size": BUCKET_NUMEL},
        "partition": {"replicated": {"bucket_bytes": 4 * BUCKET_NUMEL}} if case["stage"] == 0 else {},
    }


def predicted(engine: Any, case: dict[str, Any], *, overflows: bool) -> dict[str, Traffic]:
    """Predict from the model's sizes and the plan's dtypes; the engine's buckets are not asked."""
    inputs = engine.parts.partition.inputs
    params = [(param.numel(), inputs.dtypes[param]) for param in reversed(list(build_params(engine)))]
    itemsize = max(dtypes.reduce.itemsize for _, dtypes in params)
    bound = 4 * BUCKET_NUMEL if case["stage"] == 0 else BUCKET_NUMEL * itemsize
    plan = plan_buckets(
        [numel * dtypes.reduce.itemsize for numel, dtypes in params], [0] * len(params), bound, bound // 25
    )
    assert len(plan) > 1
    buckets = [
        BucketSizes(
            cut([params[at][0] for at in places], comm.get_world_size()),
            params[0][1].reduce.itemsize,
            params[0][1].stored.itemsize,
        )
        for places in plan
    ]
    return step_traffic(
        buckets,
        stage=case["stage"],
        accumulation=case["accumulation"],
        backend=case["backend"],
        find_sources=inputs.find_sources,
        overflows=overflows,
    )


def build_params(engine: Any) -> list[nn.Parameter]:
    return list(engine.module.parameters())


def wrong_steps(*, overflows: bool = False) -> list[str]:
    """Return the cases whose step moved something else, with both."""
    found = []
    # A step with inf where the precision does not skip it: in fp32.
    cases = [case for case in CASES if not overflows or (case["dtype"] == "fp32" and case["stage"])]
    assert cases
    for case in cases:
        with mock.patch.object(collectives, "backend_of", return_value=case["backend"]):
            engine = ds_core.initialize(model=build(), config=config_of(case))[0]
            with CollectiveWatch() as seen:
                for step in range(2):
                    seen.clear()
                    for _ in range(case["accumulation"]):
                        loss = engine(torch.ones(2, 13, dtype=engine.module[0].weight.dtype)).float().square().mean()
                        engine.backward(loss * (math.inf if overflows and step else 1.0))
                        engine.step()
            expected = predicted(engine, case, overflows=overflows)
            moved = seen.traffic(dist.group.WORLD)
            if moved != expected or len(seen.totals) != len(moved):
                found.append(f"{case}: moved {seen.totals}, predicted {expected}")
            engine.destroy()
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_a_step_moves_what_is_predicted(world_size: int) -> None:
    functions = [wrong_steps] if world_size > 2 else [wrong_steps, partial(wrong_steps, overflows=True)]
    for of_ranks in run_ranks(functions, world_size):
        assert of_ranks == [[]] * world_size


def test_the_prediction_by_hand() -> None:
    # 10 and 3 elements on 4 ranks: segments of 4, 16 with the padding. Weights in 2 bytes, reduced in 4.
    sizes = [BucketSizes(cut([10, 3], 4), reduce_bytes=4, stored_bytes=2)]
    small = {"all_reduce": Traffic(2, 8 + 8, 8 + 8)}
    # At stage 2 with a number per rank.
    counted = {"all_reduce": Traffic(2, 8 + 16 + 8, 8 + 16 + 8)}
    ring = {"all_gather_into_tensor": Traffic(1, 8, 32)}
    assert step_traffic(sizes, stage=1, accumulation=3, backend="nccl") == {
        "reduce_scatter_tensor": Traffic(1, 64, 16),
        **ring,
        **small,
    }
    assert step_traffic(sizes, stage=2, accumulation=3, backend="nccl") == {
        "reduce_scatter_tensor": Traffic(3, 192, 48),
        **ring,
        **counted,
    }
    # To and from 3 others: 3 x 16 bytes of gradients a backward, 3 x 8 of weights.
    assert step_traffic(sizes, stage=2, accumulation=3, backend="gloo") == {
        "send": Traffic(9 + 3, 144 + 24, 0),
        "recv": Traffic(9 + 3, 0, 144 + 24),
        **counted,
    }
    skipped = step_traffic(sizes, stage=1, accumulation=3, backend="nccl", updates=False, overflows=True)
    assert skipped == {"reduce_scatter_tensor": Traffic(1, 64, 16), "all_reduce": Traffic(3, 24, 24)}
    # 13 elements and 2 flags, once a window; with one mark for each rank.
    assert step_traffic(sizes, stage=0, accumulation=3, backend="gloo") == {"all_reduce": Traffic(1, 60, 60)}
    assert step_traffic(sizes, stage=0, accumulation=3, backend="gloo", find_sources=True) == {
        "all_reduce": Traffic(1, 76, 76)
    }


def test_other_layouts_and_empty_ones() -> None:
    # Whole parameters on 2 ranks: the segment is that of the fullest.
    sizes = [BucketSizes(whole([10, 3], 2), 4, 4)]
    assert step_traffic(sizes, stage=1, accumulation=1, backend="gloo")["send"] == Traffic(2, 80, 0)
    nothing = [BucketSizes(cut([0], 2), 4, 4)]
    assert step_traffic(nothing, stage=1, accumulation=1, backend="gloo") == {"all_reduce": Traffic(2, 12, 12)}


@pytest.mark.skipif(not DOC.is_file(), reason="the documents are not beside this package")
def test_the_documented_table_is_the_predicted_one() -> None:
    assert table() in DOC.read_text()
