"""The memory estimators: DeepSpeed's numbers where it counts right, and what an engine really holds."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ds_core
import ds_zero
from ds_core import registry
from ds_core.errors import ConfigError
from ds_core.testing.memory import LiveStorage
from ds_core.testing.ranks import run_ranks
from ds_zero import (
    estimate_zero2_model_states_mem_needs as zero2,
)
from ds_zero import (
    estimate_zero2_model_states_mem_needs_all_cold as zero2_cold,
)
from ds_zero import (
    estimate_zero2_model_states_mem_needs_all_live as zero2_live,
)
from ds_zero import (
    estimate_zero3_model_states_mem_needs as zero3,
)
from ds_zero import (
    estimate_zero3_model_states_mem_needs_all_cold as zero3_cold,
)
from ds_zero import (
    estimate_zero3_model_states_mem_needs_all_live as zero3_live,
)

quick = settings(deadline=None, max_examples=100)
GIB = 2**30

# Numbers that DeepSpeed 0.19.6 printed; it writes "OffloadDeviceEnum.cpu" for cpu on today's Python.
ZERO2 = """\
Estimated memory needed for params, optim states and gradients for a:
HW: Setup with 1 node, 8 GPUs per node.
SW: Model with 2851M total params.
  per CPU  |  per GPU |   Options
  127.45GB |   5.31GB | offload_optimizer=cpu
  127.45GB |  11.28GB | offload_optimizer=none
"""
ZERO3 = """\
Estimated memory needed for params, optim states and gradients for a:
HW: Setup with 1 node, 8 GPUs per node.
SW: Model with 2851M total params, 32M largest layer params.
  per CPU  |  per GPU |   Options
   71.69GB |   0.12GB | offload_param=cpu , offload_optimizer=cpu , zero_init=1
  127.45GB |   0.12GB | offload_param=cpu , offload_optimizer=cpu , zero_init=0
   63.72GB |   0.78GB | offload_param=none, offload_optimizer=cpu , zero_init=1
  127.45GB |   0.78GB | offload_param=none, offload_optimizer=cpu , zero_init=0
    1.43GB |   6.09GB | offload_param=none, offload_optimizer=none, zero_init=1
  127.45GB |   6.09GB | offload_param=none, offload_optimizer=none, zero_init=0
"""


def test_the_printed_tables(capsys: pytest.CaptureFixture[str]) -> None:
    zero2_cold(2851e6, num_gpus_per_node=8)
    assert capsys.readouterr().out == ZERO2
    zero3_cold(2851e6, 32e6, num_gpus_per_node=8)
    assert capsys.readouterr().out == ZERO3


def test_the_head_of_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    zero3_cold(70e6, 3e6, 1, 2, trainable_params=8e6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "HW: Setup with 2 nodes, 1 GPU per node."
    assert lines[2] == "SW: Model with 70M total params, 8M of them trained, 3M largest layer params."


@quick
@given(
    params=st.integers(0, 10**12),
    largest=st.integers(0, 10**12),
    gpus=st.integers(1, 16),
    nodes=st.integers(1, 64),
    factor=st.sampled_from([1.0, 1.5, 2.0]),
)
def test_the_formulas(params: int, largest: int, gpus: int, nodes: int, factor: float) -> None:
    """Those of the specification, written out."""
    ranks, layer = gpus * nodes, min(largest, params)
    about = partial(pytest.approx, rel=1e-12, abs=2)
    more: dict[str, Any] = {"num_gpus_per_node": gpus, "num_nodes": nodes, "additional_buffer_factor": factor}
    assert zero2(params, **more) == about((params * max(4 * ranks, 16) * factor, 2 * params))
    wanted = (params * 4 * gpus * factor, 2 * params + 18 * params / ranks)
    assert zero2(params, cpu_offload=False, **more) == about(wanted)
    per_node = {
        (True, True, True): (18 * params / nodes, 4 * layer),
        (True, True, False): (params * max(4 * gpus, 18 / nodes), 4 * layer),
        (True, False, True): (16 * params / nodes, 4 * layer + 2 * params / ranks),
        (True, False, False): (params * max(4 * gpus, 16 / nodes), 4 * layer + 2 * params / ranks),
        (False, False, True): (4 * layer * gpus, 4 * layer + 18 * params / ranks),
        (False, False, False): (4 * params * gpus, 4 * layer + 18 * params / ranks),
    }
    for (offload, offload_params, zero_init), (cpu, gpu) in per_node.items():
        found = zero3(params, layer, gpus, nodes, offload, offload_params, zero_init, factor)
        assert found == about((cpu * factor, gpu, 4 * layer))


numbers = st.integers(0, 10**12)
choices = st.fixed_dictionaries(
    {"cpu_offload": st.booleans(), "bytes_per_weight": st.sampled_from([2, 4]), "num_gpus_per_node": st.integers(1, 8)}
)


@quick
@given(total=numbers, more=numbers, trained=numbers, nodes=st.integers(1, 64), choice=choices)
def test_more_parameters_take_more_and_more_nodes_take_less(
    total: int, more: int, trained: int, nodes: int, choice: dict[str, Any]
) -> None:
    trained = min(trained, total)
    for estimate in (
        lambda total, trained, nodes: zero2(total, num_nodes=nodes, trainable_params=trained, **choice),
        lambda total, trained, nodes: zero3(total, 0, num_nodes=nodes, trainable_params=trained, **choice),
    ):
        here = estimate(total, trained, nodes)
        assert all(a <= b for a, b in zip(here, estimate(total + more, trained, nodes), strict=True))
        assert all(a <= b for a, b in zip(here, estimate(total, total, nodes), strict=True))
        assert here[1] >= estimate(total, trained, nodes + 1)[1], "of a GPU"


def test_what_is_frozen_has_neither_gradients_nor_state() -> None:
    assert zero2(100, cpu_offload=False, trainable_params=0) == (600, 200)
    assert zero2(100, cpu_offload=False, trainable_params=10) == (600, 200 + 180)
    assert zero3(100, 10, cpu_offload=False, cpu_offload_params=False, trainable_params=10) == (60, 40 + 200 + 160, 40)


def test_all_in_fp32_there_are_no_masters() -> None:
    assert zero2(100, cpu_offload=False, bytes_per_weight=4)[1] == 100 * (4 + 8 + 4)
    assert zero2(100, cpu_offload=False, bytes_per_weight=4, optimizer_bytes_per_param=0)[1] == 100 * (4 + 4)
    assert zero2(100, bytes_per_weight=4) == (2400, 400)


class Odd(nn.Module):
    """Tied, by the parameter and by its memory; frozen; without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 10)
        self.head = nn.Linear(10, 50, bias=False)
        self.head.weight = self.embed.weight
        self.again = nn.Parameter(self.embed.weight.data)
        self.body = nn.Linear(10, 30)
        self.frozen = nn.Linear(10, 20, bias=False).requires_grad_(False)
        self.empty = nn.Parameter(torch.zeros(0, 4))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_is_counted_right(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_zero import estimates

    with torch.device(device):
        model = Odd()
    assert estimates._count(model) == (500 + 330 + 200, 500 + 330, 500)
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(estimates, "_print", lambda hardware, model, rows: seen.append((model, rows)))
    zero2_live(model, 4)
    cpu, gpu = zero2(1030, 4, cpu_offload=False, trainable_params=830)
    assert seen[0][1][1] == (cpu, gpu, "offload_optimizer=none")
    zero3_live(model, 4)
    cpu, gpu, _ = zero3(1030, 500, 4, cpu_offload=False, cpu_offload_params=False, trainable_params=830)
    assert seen[1][1][4][:2] == (cpu, gpu)


def test_parameters_in_one_flat_tensor_all_count() -> None:
    from ds_zero import estimates

    model = nn.Module()
    flat = torch.zeros(10)
    for at, length in ((0, 4), (4, 0), (4, 6)):
        model.register_parameter(f"p{at}_{length}", nn.Parameter(flat[at : at + length]))
    assert estimates._count(model) == (10, 10, 10)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"num_gpus_per_node": 0}, "num_gpus_per_node is 0"),
        ({"num_nodes": -1}, "num_nodes is -1"),
        ({"additional_buffer_factor": -0.5}, "additional_buffer_factor is -0.5"),
        ({"trainable_params": 11}, "11 of 10 parameters are trained"),
        ({"total_params": -1}, "-1 of -1 parameters are trained"),
        ({"bytes_per_weight": 3}, "weights have 3 bytes"),
        ({"optimizer_bytes_per_param": -8}, "optimizer state has -8 bytes"),
    ],
)
def test_numbers_that_cannot_be(arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        zero2(**{"total_params": 10, **arguments})
    with pytest.raises(ConfigError, match=what):
        zero3(**{"total_params": 10, "largest_layer_params": 0, **arguments})


def test_a_largest_layer_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="the largest layer has 11 of 10 parameters"):
        zero3(10, 11)


def test_numbers_take_no_torch() -> None:
    code = (
        "import sys, ds_zero; ds_zero.estimate_zero2_model_states_mem_needs_all_cold(1e9, 8); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True, stdout=subprocess.DEVNULL)


def check_against_an_engine(precision: str) -> None:
    """What is there while the optimizer updates: gradients too, and no messages of collectives."""
    width, layers = 32, 60  # memory of three buckets, a layer each, stays with the engine; it is not in the formula
    numel = layers * (width * width + width)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "log_level": "error",
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1},
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
    }
    held: list[int] = []
    with LiveStorage() as live:
        engine = ds_core.initialize(model=model, config=config)[0]
        live.track(model)
        engine.basic_optimizer.register_step_post_hook(lambda *_: held.append(live.live_bytes))
        dtype = model[0].weight.dtype
        for _ in range(2):
            engine.backward(engine(torch.ones(1, width, dtype=dtype)).float().mean())
            engine.step()
    expected = zero2(numel, engine.world_size, cpu_offload=False, bytes_per_weight=dtype.itemsize)[1]
    assert len(held) == 2
    assert held[1] == pytest.approx(expected, rel=0.05), f"{held} is not {expected}, {held[1] / expected:.3f}"


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_is_what_an_engine_holds(world_size: int) -> None:
    names = [name for name in ("fp32", "bf16") if name in registry.names("precision")]
    run_ranks([partial(check_against_an_engine, name) for name in names], world_size)


def test_they_are_public() -> None:
    assert {name for name in ds_zero.__all__ if name.startswith("estimate")} == {
        f"estimate_zero{stage}_model_states_mem_needs{kind}"
        for stage in (2, 3)
        for kind in ("", "_all_live", "_all_cold")
    }
