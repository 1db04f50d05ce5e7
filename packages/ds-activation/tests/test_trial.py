"""Runs that leave no trace, and what is noted in them."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ds_activation import trial
from ds_activation.host_copies import HostCopies
from ds_activation.rng import get_cuda_rng_tracker
from ds_activation.trial import Tally, as_before, timed

if TYPE_CHECKING:
    import pytest

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


def test_the_speed_of_copies_is_that_of_whole_copies_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).with_name("fake_device.py")
    spec = importlib.util.spec_from_file_location("fake_device", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device = module.FakeDevice()
    monkeypatch.setattr(trial, "HostCopies", partial(HostCopies, driver=device))
    monkeypatch.setattr(trial, "_PROBE_BYTES", 2**16)
    there, back = trial.seconds_per_byte(CPU)
    assert device.log == device.done == ["to host", "to device"] * 2
    assert [nbytes for nbytes, _ in device.buffers] == [2**16]
    assert (0 <= there < float("inf"), 0 <= back < float("inf")) == (True, True)


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
