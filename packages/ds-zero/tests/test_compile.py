"""P20: with torch.compile stages 0 to 2 break no graph, compile nothing after the second step, and keep the numbers."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm, registry
from ds_core.testing.ranks import run_ranks

STEPS = 4
HOWS = ("torch.compile", "engine.compile", "submodules")
PRECISIONS = ("fp32", *({"bf16"} & set(registry.names("precision"))))


@dataclass(frozen=True)
class Case:
    how: str
    stage: int
    accumulation: int
    precision: str = "fp32"
    backend: str = "aot_eager"

    @property
    def eager(self) -> Case:
        return Case("eager", self.stage, self.accumulation, self.precision)


# Each way, stage, accumulation and precision, and each pair of them but way and precision; the product is slow.
FEW = [
    *(Case("torch.compile", 1, 1), Case("torch.compile", 2, 2), Case("submodules", 1, 2), Case("engine.compile", 2, 1)),
    *(Case("torch.compile", 0, 1, "bf16"), Case("submodules", 2, 1, "bf16"), Case("engine.compile", 1, 2, "bf16")),
    *([Case("torch.compile", 2, 2, backend="inductor")] if shutil.which("g++") else []),
]
EVERY = [Case(*case) for case in product(HOWS, (0, 1, 2), (1, 2), PRECISIONS)]


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


def config(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "eps": 0.01}},
        # Several buckets: parameters and gradients are views of several flat tensors.
        "zero_optimization": {"stage": case.stage, "reduce_bucket_size": 50},
    }
    return found if case.precision == "fp32" else {**found, case.precision: {"enabled": True}}


def train(case: Case) -> dict[str, Any]:
    """Train; return losses, weights, the graphs by the end of each step, and why graphs broke."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model: nn.Module = Model()
    if case.how == "submodules":
        for index, layer in enumerate(model.layers):
            model.layers[index] = torch.compile(layer, backend=case.backend)
    whole = torch.compile(model, backend=case.backend) if case.how == "torch.compile" else model
    engine = ds_core.initialize(model=whole, config=config(case))[0]
    if case.how == "engine.compile":
        engine.compile(backend=case.backend)
    losses, graphs = [], []
    for step in range(STEPS):
        with torch._dynamo.config.patch(error_on_recompile=step >= 2):
            for micro in range(case.accumulation):
                generator = torch.Generator().manual_seed(100 * step + 10 * micro + comm.get_rank())
                loss = engine(torch.randn(2, 6, generator=generator).to(model.head.weight.dtype))
                losses.append(loss.item())
                engine.backward(loss)
                engine.step()
        graphs.append(counters["stats"]["unique_graphs"])
    return {
        "losses": losses,
        "weights": [param.detach().clone() for param in model.parameters()],
        "graphs": graphs,
        "breaks": dict(counters["graph_break"]),
    }


def check(cases: list[Case]) -> None:
    eager = list(dict.fromkeys(case.eager for case in cases))
    found = run_ranks([partial(train, case) for case in [*eager, *cases]], 2, timeout_s=120)
    of = dict(zip([*eager, *cases], found, strict=True))
    for case in cases:
        for mine, expected in zip(of[case], of[case.eager], strict=True):
            assert expected["graphs"] == [0] * STEPS
            assert mine["graphs"][0] >= 1, f"{case}: was not compiled"
            assert len(set(mine["graphs"][1:])) == 1, f"{case}: recompiled, {mine['graphs']}"
            assert case.how == "submodules" or mine["graphs"] == [1] * STEPS, f"{case}: {mine['graphs']}"
            assert mine["breaks"] == {}, f"{case}: {mine['breaks']}"
            assert mine["losses"] == pytest.approx(expected["losses"], abs=1e-5), case
            for weight, of_eager in zip(mine["weights"], expected["weights"], strict=True):
                torch.testing.assert_close(weight, of_eager, rtol=0, atol=1e-5, msg=lambda text, c=case: f"{c}: {text}")


def test_compiled_equals_eager() -> None:
    check([case for case in FEW if case.precision in PRECISIONS])


@pytest.mark.slow
def test_compiled_equals_eager_in_every_case() -> None:
    check(EVERY)
