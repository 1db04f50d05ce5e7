"""Contract of the seam ``activation``; inherit :class:`ActivationContract` in a plugin's tests."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ds_core.testing.memory import LiveStorage

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ds_core.interfaces.activation import ActivationCheckpointing

__all__ = ["ActivationContract"]

WIDTH, DEPTH = 16, 6


class ActivationContract:
    """What every way to checkpoint activations promises."""

    @pytest.fixture
    def activation(self) -> ActivationCheckpointing:
        """Override: the instance under test."""
        raise NotImplementedError

    @pytest.mark.parametrize("p", [0.0, 0.5])
    def test_outputs_and_gradients_are_the_same(self, activation: ActivationCheckpointing, p: float) -> None:
        block, inputs = _block(p), torch.randn(4, WIDTH)
        plain = _run(copy.deepcopy(block), inputs, lambda function, *args: function(*args))
        checked = _run(block, inputs, activation.checkpoint)
        for a, b in zip(plain, checked, strict=True):
            assert torch.equal(a, b)

    def test_random_numbers_afterwards_are_the_same(self, activation: ActivationCheckpointing) -> None:
        inputs = torch.randn(4, WIDTH, requires_grad=True)
        drawn = []
        for run in (lambda function, *args: function(*args), activation.checkpoint):
            torch.manual_seed(3)
            run(_block(0.5), inputs).sum().backward()
            drawn.append(torch.rand(3))
        assert torch.equal(*drawn)

    def test_inner_activations_are_not_kept(self, activation: ActivationCheckpointing) -> None:
        block, inputs = _block(0.0), torch.randn(64, WIDTH, requires_grad=True)
        with LiveStorage() as plain:
            kept = block(inputs)
            kept_bytes = plain.live_bytes
        with LiveStorage() as checked:
            out = activation.checkpoint(block, inputs)
            # Half is a wide bound: the output and the input alone are needed, of 2 * DEPTH activations.
            assert checked.live_bytes <= kept_bytes / 2
        assert torch.equal(kept, out)

    def test_keyword_arguments_and_other_values_pass(self, activation: ActivationCheckpointing) -> None:
        weight = torch.randn(3, requires_grad=True)

        def function(tensor: Tensor, factor: int, *, flag: bool, name: str | None = None) -> tuple[Tensor, str, None]:
            assert flag
            return tensor * factor, f"{name}", None

        out, text, nothing = activation.checkpoint(function, weight, 3, flag=True, name="n")
        assert (text, nothing) == ("n", None)
        out.sum().backward()
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.full((3,), 3.0))

    def test_several_outputs_used_apart(self, activation: ActivationCheckpointing) -> None:
        first, second = (torch.randn(3, requires_grad=True) for _ in range(2))
        a, b = activation.checkpoint(lambda x, y: (x * y, x.exp()), first, second)
        a.sum().backward()
        assert first.grad is not None
        assert second.grad is not None
        assert torch.equal(first.grad, second.detach())
        assert torch.equal(second.grad, first.detach())
        assert torch.equal(b, first.exp())

    def test_inputs_without_gradients_still_give_the_weights_theirs(self, activation: ActivationCheckpointing) -> None:
        layer, inputs = nn.Linear(WIDTH, 1), torch.randn(4, WIDTH)
        activation.checkpoint(layer, inputs).sum().backward()
        assert layer.weight.grad is not None
        torch.testing.assert_close(layer.weight.grad, inputs.sum(0, keepdim=True))

    def test_a_layer_used_twice_gets_both_gradients(self, activation: ActivationCheckpointing) -> None:
        layer, inputs = nn.Linear(WIDTH, WIDTH), torch.randn(4, WIDTH)
        twin = copy.deepcopy(layer)
        activation.checkpoint(layer, activation.checkpoint(layer, inputs)).sum().backward()
        twin(twin(inputs)).sum().backward()
        for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            torch.testing.assert_close(a.grad, b.grad)

    def test_nested(self, activation: ActivationCheckpointing) -> None:
        block, inputs = _block(0.5), torch.randn(4, WIDTH)

        def outer(function: Callable[..., Any], x: Tensor) -> Any:
            return activation.checkpoint(lambda y: activation.checkpoint(function, y), x)

        plain = _run(copy.deepcopy(block), inputs, lambda function, *args: function(*args))
        for a, b in zip(plain, _run(block, inputs, outer), strict=True):
            assert torch.equal(a, b)

    def test_without_autograd_it_is_a_call(self, activation: ActivationCheckpointing) -> None:
        block, inputs = _block(0.0), torch.randn(4, WIDTH)
        with torch.no_grad():
            assert torch.equal(activation.checkpoint(block, inputs), block(inputs))

    def test_an_error_inside_arrives_as_it_is(self, activation: ActivationCheckpointing) -> None:
        def broken(_: Tensor) -> Tensor:
            raise KeyError("inside")

        with pytest.raises(KeyError, match="inside"):
            activation.checkpoint(broken, torch.zeros(1, requires_grad=True))


def _block(p: float) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(p)]
    return nn.Sequential(*layers)


def _run(block: nn.Module, inputs: Tensor, call: Callable[..., Any]) -> list[Tensor]:
    torch.manual_seed(1)
    inputs = inputs.clone().requires_grad_()
    out = call(block, inputs)
    out.square().sum().backward()
    gradients = [param.grad for param in (inputs, *block.parameters())]
    assert all(gradient is not None for gradient in gradients)
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]
