"""P20: with torch.compile our hooks break no graph and cause no recompilation, and the numbers stay."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.testing.ranks import run_ranks

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "eps": 0.01}},
    "partition": {"replicated": {"bucket_bytes": 200}},
}
STEPS = 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.head = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x).square().mean()


def train(how: str) -> dict[str, Any]:
    """Train through an engine; return losses, weights, and what the compiler counted by the end of each step."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model: nn.Module = Model()
    compiled = how == "torch.compile"
    engine = ds_core.initialize(model=torch.compile(model, backend="aot_eager") if compiled else model, config=CONFIG)[
        0
    ]
    if how == "engine.compile":
        engine.compile(backend="aot_eager")
        engine.compile(backend="aot_eager")  # nothing happens
        assert engine.is_compiled
    losses, graphs = [], []
    for step in range(STEPS):
        for micro in range(2):
            seed = 100 * step + 10 * micro + comm.get_rank()
            loss = engine(torch.randn(2, 6, generator=torch.Generator().manual_seed(seed)))
            losses.append(loss.item())
            engine.backward(loss)
            engine.step()
        graphs.append(counters["stats"]["unique_graphs"])
    return {
        "losses": losses,
        "weights": {name: param.detach().clone() for name, param in model.named_parameters()},
        "graphs": graphs,
        "breaks": dict(counters["graph_break"]),
        "steps": engine.global_steps,
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_compiled_equals_eager_in_one_graph(world_size):
    ways = ("eager", "torch.compile", "engine.compile")
    eager, *compiled = run_ranks([partial(train, how) for how in ways], world_size, timeout_s=120)
    for how, of_ranks in zip(ways[1:], compiled, strict=True):
        for found, expected in zip(of_ranks, eager, strict=True):
            assert expected["graphs"] == [0] * STEPS
            assert found["graphs"] == [1] * STEPS, f"{how}: recompiled"
            assert found["breaks"] == {}, f"{how}: {found['breaks']}"
            assert found["steps"] == STEPS
            assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
            for name, weight in expected["weights"].items():
                torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5)


def test_a_checkpoint_of_a_compiled_model_is_one_of_the_model(tmp_path):
    compiled = ds_core.initialize(model=torch.compile(Model(), backend="aot_eager"), config=CONFIG)[0]
    for _ in range(2):
        compiled.backward(compiled(torch.ones(2, 6)))
        compiled.step()
    compiled.save_checkpoint(tmp_path)
    plain = ds_core.initialize(model=Model(), config=CONFIG)[0]
    plain.load_checkpoint(tmp_path)
    assert plain.global_steps == 1
    assert torch.equal(plain.module.head.weight, compiled.module.head.weight)
    mine, theirs = (engine.optimizer.state[engine.module.head.weight] for engine in (plain, compiled))
    assert torch.equal(mine["exp_avg"], theirs["exp_avg"])
    comm.destroy_process_group()
