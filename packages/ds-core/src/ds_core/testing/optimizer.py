"""Contract of the seam ``optimizer``; inherit :class:`OptimizerContract` in a plugin's tests."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ds_core.interfaces.optimizer import ScaledStep
from ds_core.optim.elementwise import is_elementwise

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from ds_core.interfaces.optimizer import OptimizerFactory

__all__ = ["OptimizerContract", "is_same_update", "updated_in_pieces"]

SHAPES = ((4, 3), (5,), (), (0, 2))


class OptimizerContract:
    """What every optimizer promises."""

    @pytest.fixture
    def factory(self) -> OptimizerFactory:
        """Override: what the entry point names."""
        raise NotImplementedError

    @pytest.fixture
    def params(self) -> dict[str, Any]:
        """Override if needed: ``optimizer.params``; with ``lr``, and without weight decay."""
        return {"lr": 0.01}

    def test_it_updates_the_tensors_it_was_given(self, factory: OptimizerFactory, params: dict[str, Any]) -> None:
        tensors = _tensors()
        optimizer = factory([{"params": tensors}], **params)
        assert isinstance(optimizer, torch.optim.Optimizer)
        held = [param for group in optimizer.param_groups for param in group["params"]]
        assert all(a is b for a, b in zip(held, tensors, strict=True))
        before = [tensor.detach().clone() for tensor in tensors]
        _set_gradients(tensors, 0)
        optimizer.step()
        for tensor, old in zip(tensors, before, strict=True):
            assert tensor.numel() == 0 or not torch.equal(tensor, old)

    def test_it_lowers_a_convex_loss(self, factory: OptimizerFactory, params: dict[str, Any]) -> None:
        tensors = _tensors()
        optimizer = factory([{"params": tensors}], **params)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = torch.stack([tensor.square().sum() for tensor in tensors]).sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]

    def test_a_tensor_without_a_gradient_is_left_alone(self, factory: OptimizerFactory, params: dict[str, Any]) -> None:
        tensors = _tensors()
        optimizer = factory([{"params": tensors}], **params)
        for step in range(3):
            _set_gradients(tensors, step)
            tensors[1].grad = None
            before = tensors[1].detach().clone()
            optimizer.step()
            assert torch.equal(tensors[1], before)

    def test_groups_have_their_own_options(self, factory: OptimizerFactory, params: dict[str, Any]) -> None:
        still, moving = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        optimizer = factory([{"params": [still], "lr": 0.0}, {"params": [moving]}], **params)
        assert [group["lr"] for group in optimizer.param_groups] == [0.0, params["lr"]]
        _set_gradients([still, moving], 0)
        optimizer.step()
        assert torch.equal(still, torch.ones(3))
        assert not torch.equal(moving, torch.ones(3))

    def test_the_groups_rate_is_the_one_used(self, factory: OptimizerFactory, params: dict[str, Any]) -> None:
        """A schedule writes to ``group["lr"]`` between steps."""
        tensors = _tensors()
        optimizer = factory([{"params": tensors}], **params)
        _set_gradients(tensors, 0)
        optimizer.step()
        before = [tensor.detach().clone() for tensor in tensors]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))

    @pytest.mark.parametrize("saved_at", [0, 1, 3])
    def test_state_continues_exactly(self, factory: OptimizerFactory, params: dict[str, Any], saved_at: int) -> None:
        original = _tensors()
        optimizer = factory([{"params": original}], **params)
        _run(optimizer, original, range(saved_at))
        copies = [tensor.detach().clone().requires_grad_() for tensor in original]
        resumed = factory([{"params": copies}], **params)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        _run(optimizer, original, range(saved_at, saved_at + 3))
        _run(resumed, copies, range(saved_at, saved_at + 3))
        assert all(torch.equal(a, b) for a, b in zip(original, copies, strict=True))

    def test_a_factor_multiplies_the_gradients(self, factory: OptimizerFactory, params: dict[str, Any]) -> None:
        """Only for optimizers that offer it; a power of two, so that multiplying rounds nothing."""
        scaled, plain = _tensors(), _tensors()
        with_factor, without = factory([{"params": scaled}], **params), factory([{"params": plain}], **params)
        if not isinstance(with_factor, ScaledStep):
            pytest.skip(f"{type(with_factor).__name__} has no step_scaled; the core multiplies the gradients")
        for step in range(3):
            _set_gradients(scaled, step)
            _set_gradients(plain, step)
            for tensor in plain:
                assert tensor.grad is not None
                tensor.grad.mul_(0.25)
            with_factor.step_scaled(0.25)
            without.step()
            for a, b in zip(scaled, plain, strict=True):
                torch.testing.assert_close(a, b, rtol=2**-20, atol=2**-20)

    def test_what_it_says_of_elements_is_so(self, factory: OptimizerFactory, params: dict[str, Any]) -> None:
        """Only for those that say ``elementwise``: a partition may cut a parameter anywhere."""
        if not is_elementwise(factory):
            pytest.skip("it gets whole parameters")
        for cuts in ((), (5,), (1, 2, 11), (0, 6, 6, 12)):
            whole, in_pieces = updated_in_pieces(partial(factory, **params), (4, 3), cuts)
            assert is_same_update(whole, in_pieces), f"cut at {cuts}"

    def test_two_optimizers_share_nothing(self, factory: OptimizerFactory, params: dict[str, Any]) -> None:
        alone, beside, other = _tensors(), _tensors(), _tensors()
        first = factory([{"params": alone}], **params)
        _run(first, alone, range(3))
        second, third = factory([{"params": beside}], **params), factory([{"params": other}], **params)
        for step in range(3):
            _run(second, beside, [step])
            _run(third, other, [step + 7])
        assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))

    def test_an_unknown_key_is_a_type_error(self, factory: OptimizerFactory, params: dict[str, Any]) -> None:
        with pytest.raises(TypeError, match="surely_no_such_key"):
            factory([{"params": _tensors()}], **params, surely_no_such_key=1)

    def test_parameters_are_left_as_given(self, factory: OptimizerFactory, params: dict[str, Any]) -> None:
        before = copy.deepcopy(params)
        factory([{"params": _tensors()}], **params)
        assert params == before


def updated_in_pieces(
    build: Callable[[list[dict[str, Any]]], Optimizer], shape: Sequence[int], cuts: Sequence[int], *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return a tensor after three updates of all of it, and after the same gradients for intervals of it, each flat.

    Args:
        build: makes an optimizer.
        shape: of the tensor.
        cuts: where the intervals begin and end, in order; two may be the same.
        seed: of values and gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(tuple(shape), generator=generator).requires_grad_()
    places = list(zip((0, *cuts), (*cuts, whole.numel()), strict=True))
    pieces = [whole.detach().view(-1)[low:high].clone().requires_grad_() for low, high in places]
    other = torch.randn(3, generator=generator)
    of_whole = build([{"params": [whole, other.clone().requires_grad_()]}])
    of_pieces = build([{"params": [*pieces, other.clone().requires_grad_()]}])
    for _ in range(3):
        gradients = torch.randn(whole.numel(), generator=generator), torch.randn(3, generator=generator)
        for optimizer, parts in ((of_whole, [(0, whole.numel())]), (of_pieces, places)):
            *tensors, last = optimizer.param_groups[0]["params"]
            for tensor, (low, high) in zip(tensors, parts, strict=True):
                tensor.grad = gradients[0][low:high].clone().view(tensor.shape)
            last.grad = gradients[1].clone()
            optimizer.step()
    return whole.detach(), torch.cat([piece.detach() for piece in pieces]).view(whole.shape)


def is_same_update(a: Tensor, b: Tensor) -> bool:
    """Return whether two of :func:`updated_in_pieces` are the same numbers.

    Not always the same bits: a vector's last elements may be updated by other instructions, which round differently,
    some ten operations in each of three updates. So 64 roundings of 2**-24, for values of about 1.
    """
    return torch.allclose(a, b, rtol=2**-18, atol=2**-18)


def _tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def _set_gradients(tensors: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator)


def _run(optimizer: Optimizer, tensors: list[Tensor], steps: Any) -> None:
    for step in steps:
        _set_gradients(tensors, step)
        optimizer.step()
