"""``step(factor)`` is ``step()`` on gradients multiplied by the factor, whichever way the optimizer can."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from ds_core.optim.scaled import OptimizerStep

SHAPES = ((4, 3), (5,), (), (0, 2), (7,))


class WithStepScaled(torch.optim.SGD):
    """Multiplies by itself, and leaves the gradients as they are."""

    @torch.no_grad()
    def step_scaled(self, factor: float) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.add_(param.grad * factor, alpha=-group["lr"])


OPTIMIZERS = {
    "fused Adam": (torch.optim.Adam, {"fused": True}, "grad_scale"),
    "fused AdamW": (torch.optim.AdamW, {"fused": True, "weight_decay": 0.1}, "grad_scale"),
    "fused AdamW amsgrad": (torch.optim.AdamW, {"fused": True, "amsgrad": True}, "grad_scale"),
    "fused SGD": (torch.optim.SGD, {"fused": True, "lr": 0.1, "momentum": 0.9}, "grad_scale"),
    "fused Adagrad": (torch.optim.Adagrad, {"fused": True, "lr": 0.1}, "grad_scale"),
    "Adam": (torch.optim.Adam, {}, "multiply"),
    "foreach AdamW": (torch.optim.AdamW, {"foreach": True}, "multiply"),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, "multiply"),
    "RMSprop": (torch.optim.RMSprop, {}, "multiply"),
    "NAdam": (torch.optim.NAdam, {}, "multiply"),
    "step_scaled": (WithStepScaled, {"lr": 0.1}, "step_scaled"),
}


def build(name: str) -> tuple[OptimizerStep, list[torch.Tensor]]:
    cls, options, _ = OPTIMIZERS[name]
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
    return OptimizerStep(cls([{"params": tensors[:2]}, {"params": tensors[2:], "lr": 0.02}], **options)), tensors


def give_gradients(tensors: list[torch.Tensor], step: int, factor: float = 1.0) -> None:
    """The second never has one, the last not always."""
    generator = torch.Generator().manual_seed(step)
    for place, tensor in enumerate(tensors):
        gradient = torch.randn(tensor.shape, generator=generator)
        tensor.grad = None if place == 1 or (place == 4 and step == 1) else gradient * factor


@pytest.mark.parametrize("name", OPTIMIZERS)
# A power of two rounds nothing; 0.3 rounds once each way, and once more where the kernel divides by 1 / 0.3.
@pytest.mark.parametrize("factor", [1.0, 0.25, 0.3, 2.0**-16, 3e4])
def test_a_factor_is_a_multiplication_before(name, factor):
    step, tensors = build(name)
    plain, expected = build(name)
    for number in range(4):
        give_gradients(tensors, number)
        give_gradients(expected, number, factor)
        step.step(factor)
        plain.optimizer.step()
        for got, want in zip(tensors, expected, strict=True):
            assert torch.isfinite(got).all()
            # A gradient is off by three roundings, 2**-22, and the update it makes by as much of its own size: with
            # Adam at most lr / (1 - beta) per step, with SGD lr times the gradient.
            torch.testing.assert_close(got, want, rtol=2**-20, atol=2**-20)
    before = tensors[1].clone()
    step.step(factor)
    assert torch.equal(tensors[1], before), "without a gradient"


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("factor", [0.0, math.inf, math.nan, -0.5])
def test_a_factor_that_is_no_usual_one_does_the_same_as_multiplying(name, factor):
    step, tensors = build(name)
    plain, expected = build(name)
    give_gradients(tensors, 0)
    give_gradients(expected, 0, factor)
    step.step(factor)
    plain.optimizer.step()
    for got, want in zip(tensors, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2**-20, atol=2**-20, equal_nan=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_way_is_told(name):
    assert build(name)[0].way == OPTIMIZERS[name][2]


def test_the_way_follows_the_groups():
    step, _ = build("fused AdamW")
    assert step.way == "grad_scale"
    step.optimizer.param_groups[1]["fused"] = False
    assert step.way == "multiply", "one group without it is enough"


@pytest.mark.parametrize("name", ["fused AdamW", "fused SGD", "fused Adagrad"])
def test_nothing_of_the_factor_stays_behind(name):
    step, tensors = build(name)
    give_gradients(tensors, 0)
    step.step(0.5)
    assert not hasattr(step.optimizer, "grad_scale")
    assert not hasattr(step.optimizer, "found_inf")
    tensors[0].grad = torch.ones(4, 3, dtype=torch.float32)
    tensors[2].grad = torch.ones((), dtype=torch.float32)
    step.optimizer.register_step_pre_hook(_fail)
    with pytest.raises(ZeroDivisionError):
        step.step(0.5)
    assert not hasattr(step.optimizer, "grad_scale")


def _fail(*_: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_has_a_gradient(name):
    step, tensors = build(name)
    before = [tensor.detach().clone() for tensor in tensors]
    for factor in (1.0, 0.5, math.nan):
        step.step(factor)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_schedule_of_torch_sees_that_the_optimizer_stepped(name, factor):
    # torch warns of a schedule that moves before its optimizer, and knows only of calls of step().
    step, tensors = build(name)
    schedule = torch.optim.lr_scheduler.StepLR(step.optimizer, 1)
    give_gradients(tensors, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step.step(factor)
        schedule.step()
    assert schedule.last_epoch == 1
