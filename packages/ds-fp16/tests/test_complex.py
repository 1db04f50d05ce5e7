"""A complex parameter in a model that trains in bf16, on two ranks, against plain PyTorch."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.interfaces.logical import MASTER
from ds_core.testing.ranks import run_ranks
from ds_core.testing.reference import logical_values

STEPS = 3
WORLD_SIZE = 2
OPTIMIZERS = {"SGD": {"lr": 0.03125, "momentum": 0.5}, "AdamW": {"lr": 0.125, "eps": 0.05, "weight_decay": 0.0}}
CLIPPING = 0.25
OTHER_DTYPES = {"data_types": {"grad_accum_dtype": "float32"}, "communication_data_type": "fp16"}


class Turning(nn.Module):
    """Turns and stretches its input in the complex plane before a layer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.turn = nn.Parameter(torch.randn(4, dtype=torch.complex64, generator=generator))
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            for param in self.head.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = self.turn * x
        return self.head((turned.real + 2 * turned.imag).to(self.head.weight.dtype)).square().mean()


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + rank))


def copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in module.named_parameters()}


def start(optimizer: str, **config: Any) -> Any:
    return ds_core.initialize(
        model=Turning(),
        config={
            "train_micro_batch_size_per_gpu": 5,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": True},
            "optimizer": {"type": optimizer, "params": OPTIMIZERS[optimizer]},
            **config,
        },
    )[0]


def train(optimizer: str, **config: Any) -> list[dict[str, Any]]:
    """Return what this rank had in each step."""
    engine, found = start(optimizer, **config), []
    for step in range(STEPS):
        engine.backward(engine(batch(step, comm.get_rank())))
        gradients = {name: param.grad.clone() for name, param in engine.module.named_parameters()}
        engine.step()
        norm, masters = engine.get_global_grad_norm(), logical_values(engine, MASTER)
        found.append({"gradients": gradients, "norm": norm, "weights": copies(engine.module), "masters": masters})
    return found


def plain(optimizer: str, clipping: float = math.inf) -> list[dict[str, Any]]:
    """Return the same of one process: the layer in bf16 with masters, the complex parameter as it is."""
    model = Turning()
    masters = {name: nn.Parameter(param.detach().clone()) for name, param in model.head.named_parameters("head")}
    model.head.bfloat16()
    params = dict(model.named_parameters())
    updated = {name: masters.get(name, param) for name, param in params.items()}
    steps, found = getattr(torch.optim, optimizer)(list(updated.values()), **OPTIMIZERS[optimizer]), []
    for step in range(STEPS):
        for rank in range(WORLD_SIZE):
            loss = model(batch(step, rank))
            loss.backward(torch.full_like(loss, 1 / WORLD_SIZE))
        gradients = {name: param.grad.clone() for name, param in params.items()}
        # Of all numbers, each part of a complex one among them.
        norm = sum(float(gradient.abs().double().square().sum()) for gradient in gradients.values()) ** 0.5
        for name, target in updated.items():
            target.grad = gradients[name].to(target.dtype) * min(1.0, clipping / norm)
        steps.step()
        for name, param in params.items():
            param.grad = None
            param.data.copy_(updated[name].data)
        of_masters = {name: master.detach().clone() for name, master in masters.items()}
        found.append({"gradients": gradients, "norm": norm, "weights": copies(model), "masters": of_masters})
    return found


def imaginary_inf_on_rank_one() -> dict[str, Any]:
    engine = start("SGD")
    if comm.get_rank() == 1:
        engine.module.turn.register_hook(lambda gradient: torch.complex(gradient.real, gradient.imag + math.inf))
    before = copies(engine.module)
    engine.backward(engine(batch(0, comm.get_rank())))
    engine.step()
    after = copies(engine.module)
    return {
        "applied": engine.was_step_applied(),
        "record": engine.overflows[-1],
        "moved": [name for name in before if not torch.equal(before[name], after[name])],
    }


JOBS: dict[Any, Any] = {
    **{optimizer: partial(train, optimizer) for optimizer in OPTIMIZERS},
    "clipped": partial(train, "SGD", gradient_clipping=CLIPPING),
    "other dtypes": partial(train, "SGD", **OTHER_DTYPES),
    "inf": imaginary_inf_on_rank_one,
}


@pytest.fixture(scope="module")
def results() -> dict[Any, Any]:
    """What is asked -> what each rank answered."""
    return dict(zip(JOBS, run_ranks(list(JOBS.values()), WORLD_SIZE), strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_trains_as_in_plain_pytorch(results, optimizer):
    # Two numbers have one sum, in whatever dtype: every gradient, weight and master is equal bit for bit.
    expected = plain(optimizer)
    assert all((step["gradients"]["turn"].imag != 0).all() for step in expected)
    for of_rank in results[optimizer]:
        for got, want in zip(of_rank, expected, strict=True):
            for kind in ("gradients", "weights", "masters"):
                assert got[kind].keys() == want[kind].keys()
                for name, value in want[kind].items():
                    assert got[kind][name].dtype == value.dtype, (kind, name)
                    assert torch.equal(got[kind][name], value), (kind, name)
            assert got["weights"]["turn"].dtype == torch.complex64
            assert "turn" not in got["masters"]
            assert got["norm"] == pytest.approx(want["norm"], rel=2**-20)


def test_clipping_counts_both_parts(results):
    # One step: then a weight in bf16 may be rounded the other way.
    want = plain("SGD", CLIPPING)[0]
    real_alone = sum(float(g.real.double().square().sum()) for g in want["gradients"].values()) ** 0.5
    assert want["norm"] > 1.1 * real_alone > 1.1 * CLIPPING
    for got, *_ in results["clipped"]:
        assert got["norm"] == pytest.approx(want["norm"], rel=2**-20)
        torch.testing.assert_close(got["weights"]["turn"], want["weights"]["turn"], rtol=2**-20, atol=0)


def test_the_dtypes_of_sums_and_messages_are_not_for_it(results):
    want = plain("SGD")[0]["gradients"]["turn"]
    for got, *_ in results["other dtypes"]:
        assert got["gradients"]["head.weight"].dtype == torch.float32
        assert torch.equal(got["gradients"]["turn"], want)


def test_an_inf_in_the_imaginary_part_is_found(results):
    for found in results["inf"]:
        assert found["applied"] is False
        assert found["moved"] == []
        assert found["record"].parameter == "turn"
        assert found["record"].ranks == (1,)
