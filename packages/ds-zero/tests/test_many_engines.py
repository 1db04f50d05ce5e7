"""P17: engines of several stages and dtypes in one process do not touch each other."""

from __future__ import annotations

import importlib
import pkgutil
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import ds_core
import ds_zero
from ds_core import comm, registry
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.ranks import run_ranks

STEPS = 3
KINDS: list[tuple[int, str]] = [
    *((stage, "fp32") for stage in (0, 1, 2)),
    *((stage, "bf16") for stage in (1, 2) if "bf16" in registry.names("precision")),
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)
        self.sometimes = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor, use: bool) -> torch.Tensor:
        hidden = self.first(x) + (self.sometimes(x) if use else 0)
        return self.last(torch.tanh(hidden)).square().mean()


def start(kind: tuple[int, str], model: nn.Module | None = None) -> Any:
    stage, precision = kind
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.05}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 30},
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    return ds_core.initialize(model=Model() if model is None else model, config=config)[0]


def micro(engine: Any, seed: int) -> float:
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(10 * seed + comm.get_rank()))
    loss = engine(x.to(engine.module.first.weight.dtype), (seed + comm.get_rank()) % 2 == 0)
    engine.backward(loss)
    engine.step()
    return loss.item()


def what_is_left(engine: Any) -> list[torch.Tensor]:
    """Return all this rank has of weights, masters and optimizer state."""
    states = [state[key] for state in engine.basic_optimizer.state.values() for key in sorted(state)]
    pieces = [piece.data for piece in engine.parts.partition.pieces()]
    return [tensor.detach().clone() for tensor in (*pieces, *states)]


def apart(kind: tuple[int, str]) -> tuple[list[float], list[torch.Tensor]]:
    engine = start(kind)
    losses = [micro(engine, seed) for seed in range(2 * STEPS)]
    return losses, what_is_left(engine)


def interleaved() -> list[tuple[list[float], list[torch.Tensor]]]:
    engines = [start(kind) for kind in KINDS]
    losses: list[list[float]] = [[] for _ in engines]
    for seed in range(2 * STEPS):
        for engine, of_engine in zip(engines, losses, strict=True):
            of_engine.append(micro(engine, seed))
    return [(of_engine, what_is_left(engine)) for engine, of_engine in zip(engines, losses, strict=True)]


def out_of_phase() -> list[tuple[list[float], list[torch.Tensor]]]:
    """The first engine is inside a window whenever the others end one, and others end and go around it."""
    first, *others = [start(kind) for kind in KINDS]
    losses: list[list[float]] = [[] for _ in KINDS]
    losses[0].append(micro(first, 0))
    for place, other in enumerate(others, start=1):
        losses[place] += [micro(other, seed) for seed in range(2 * STEPS)]
    left = [what_is_left(other) for other in others]
    for other in others:
        other.destroy()
    losses[0] += [micro(first, seed) for seed in range(1, 2 * STEPS)]
    return list(zip(losses, [what_is_left(first), *left], strict=True))


def is_equal(found: tuple[list[float], list[torch.Tensor]], expected: tuple[list[float], list[torch.Tensor]]) -> bool:
    same = len(found[1]) == len(expected[1]) and all(map(torch.equal, found[1], expected[1]))
    return same and found[0] == expected[0]


@pytest.mark.parametrize("world_size", [2])
def test_together_is_bit_for_bit_as_apart(world_size: int) -> None:
    functions = [*(partial(apart, kind) for kind in KINDS), interleaved, out_of_phase, one_after_another]
    *of_kinds, together, phased, again = run_ranks(functions, world_size)
    for rank in range(world_size):
        for place, kind in enumerate(KINDS):
            assert is_equal(together[rank][place], of_kinds[place][rank]), f"{kind} interleaved"
            assert is_equal(phased[rank][place], of_kinds[place][rank]), f"{kind} out of phase"
    for found in again:
        assert found == {"hooks": 0, "gradients": 0, "stages": [0, 1, 2, 1], "same": True, "dtype": "torch.float32"}


def one_after_another() -> dict[str, Any]:
    """A new engine on a module whose last engine is gone goes on from its weights, at another stage."""
    model, plain = Model(), Model()
    stages = [0, 1, 2, 1]
    same = True
    for seed, stage in enumerate(stages):
        engine = start((stage, "fp32"), model)
        # An engine of its own on the same weights, so that the two have seen the same.
        twin = start((stage, "fp32"), plain)
        for micro_seed in (2 * seed, 2 * seed + 1):
            micro(engine, micro_seed)
            micro(twin, micro_seed)
        engine.destroy()
        twin.destroy()
        twin_weights = {name: param.detach().clone() for name, param in plain.named_parameters()}
        plain = Model()
        plain.load_state_dict(twin_weights)
        same &= all(torch.equal(param, twin_weights[name]) for name, param in model.named_parameters())
    hooks = sum(len(param._post_accumulate_grad_hooks or ()) for param in model.parameters())
    gradients = sum(param.grad is not None for param in model.parameters())
    model(torch.ones(2, 5), True).backward()
    assert all(param.grad is not None for param in model.parameters()), "plain PyTorch again"
    return {
        "hooks": hooks,
        "gradients": gradients,
        "stages": stages,
        "same": same,
        "dtype": str(model.first.weight.dtype),
    }


def containers() -> dict[str, str]:
    """Return everything in the package's modules that could change, as text."""
    names = [found.name for found in pkgutil.walk_packages(ds_zero.__path__, "ds_zero.")]
    assert "ds_zero.partition" in names
    return {
        f"{name}.{attribute}": repr(value)
        for name in names
        for attribute, value in vars(importlib.import_module(name)).items()
        if not attribute.startswith("__")
        and attribute != "annotations"  # of __future__
        and not isinstance(value, (type, type(pkgutil), int, float, str, tuple, frozenset))
        and not callable(value)
    }


def test_modules_have_no_state_that_changes() -> None:
    before = containers()
    assert not [name for name in before if not name.rpartition(".")[2].isupper()], "constants are in capitals"
    for kind in KINDS:
        engine = start(kind)
        micro(engine, 0)
        micro(engine, 1)
        assert containers() == before
        engine.destroy()
