"""Torch's recomputation behind the seam; what every implementation promises is in the contract beside this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_core.activation.torch_checkpoint import TorchActivation


@pytest.fixture
def activation() -> TorchActivation:
    return TorchActivation()


def test_the_function_runs_again_in_backward(activation: TorchActivation) -> None:
    calls = []

    def function(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape)
        return x.exp()

    x = torch.ones(3, requires_grad=True)
    out = activation.checkpoint(function, x)
    assert len(calls) == 1
    out.sum().backward()
    assert len(calls) == 2
    assert torch.equal(x.grad, x.detach().exp())


@pytest.mark.parametrize("name", ["use_reentrant", "preserve_rng_state", "context_fn", "debug", "scale"])
def test_every_keyword_is_the_functions_own(activation: TorchActivation, name: str) -> None:
    weight = torch.full((3,), 2.0, requires_grad=True)

    def function(x: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"y": x * kwargs[name] * kwargs["weight"], "names": list(kwargs)}

    out = activation.checkpoint(function, torch.ones(3), **{name: 3.0}, weight=weight)
    assert out["names"] == [name, "weight"]
    out["y"].sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 3.0))
