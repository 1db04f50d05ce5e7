"""Runs that leave no trace, and what is noted in them."""

from __future__ import annotations

import torch
from torch import nn

from ds_activation.rng import get_cuda_rng_tracker
from ds_activation.trial import Tally, as_before, timed

CPU = torch.device("cpu")


def test_random_states_and_buffers_are_put_back() -> None:
    norm, tracker = nn.BatchNorm1d(3), get_cuda_rng_tracker()
    tracker.add("test", 3)
    try:
        states, drawn = tracker.get_states(), []
        for _ in range(2):
            with as_before(norm, CPU), tracker.fork("test"):
                drawn.append((torch.rand(2), norm(torch.randn(4, 3)).detach()))
        (first, out), (second, again) = drawn
        assert torch.equal(first, second)
        assert torch.equal(out, again)
        assert tracker.get_states() == states
        assert torch.equal(norm.running_mean, torch.zeros(3))  # type: ignore[arg-type]
        assert norm.num_batches_tracked == 0
    finally:
        tracker.reset()


def test_a_buffer_that_autograd_holds_may_be_put_back() -> None:
    norm = nn.BatchNorm1d(3)
    x = torch.randn(4, 3, requires_grad=True)
    out = norm(x)
    with as_before(norm, CPU):
        norm(x)
    out.square().sum().backward()
    assert x.grad is not None


def test_timed_returns_what_the_function_returns_within_the_contexts() -> None:
    output, seconds = timed(lambda x, y: (x + y, torch.is_grad_enabled()), (1,), {"y": 2}, CPU, [torch.no_grad()])
    assert output == (3, False)
    assert seconds >= 0


def test_results_that_are_kept_and_changes_of_them() -> None:
    a = torch.ones(2, 2)
    with Tally() as tally:
        product = a @ a
        torch.exp(product).mul_(2)
    assert [id(one) for one in tally.results] == [id(product)]
    assert not tally.is_changed
    with Tally() as tally:
        (a @ a).view(4).relu_()
    assert tally.is_changed
    with Tally() as tally:
        torch.zeros(2, 2).add_(a @ a)  # read, not written
    assert not tally.is_changed
